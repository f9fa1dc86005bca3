#!/usr/bin/env python3
# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""Writes peft_losses.json: ten training losses of PEFT on SmolLM2-135M-Instruct in f32.

Usage: make_peft_losses.py HF_FOLDER   (the GGUF's weights dequantised to f32; needs torch,
transformers and peft). One batch of four texts, each ended by EOS, padded for PEFT with the padding
out of attention and loss; AdamW with PyTorch's defaults.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_fixture as fixture


def batch_of(tokenizer):
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in fixture.TEXTS]
    rows = [row + [tokenizer.eos_token_id] for row in rows]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.eos_token_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return rows, {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.where(mask == 1, ids, torch.full_like(ids, -100)),
    }


def main():
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    config = LoraConfig(
        r=fixture.RANK, lora_alpha=fixture.ALPHA, target_modules=fixture.TARGETS, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    for path, (a, b) in fixture.initial_adapter().items():
        module = model.get_submodule("base_model.model." + path)
        module.lora_A["default"].weight.data = torch.from_numpy(a)
        module.lora_B["default"].weight.data = torch.from_numpy(b)
    rows, batch = batch_of(tokenizer)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=fixture.LEARNING_RATE
    )
    losses = []
    for _ in range(fixture.STEPS):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
        print(losses[-1], flush=True)
    checksum = float(sum(np.abs(a).sum(dtype=np.float64) for a, _ in fixture.initial_adapter().values()))
    out = {"losses": losses, "tokens": rows, "adapter_checksum": checksum}
    Path(__file__).with_name("peft_losses.json").write_text(json.dumps(out) + "\n")


if __name__ == "__main__":
    main()
