# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""A LoRA training step of the 1.07 B geometry by PEFT: eager, compiled, with Liger where installed."""

import os
import statistics
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from common import emit
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model(liger):
    config = LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=49152,
        rope_theta=500000.0,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(
            rope=True, swiglu=True, rms_norm=True, cross_entropy=False, fused_linear_cross_entropy=True
        )
    base = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    return get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM"))


def measure(engine, peft_model, compiled=False, checkpointing=False):
    ids = torch.randint(0, 49152, (4, 1024), device="cuda")
    if checkpointing:
        peft_model.gradient_checkpointing_enable()
        peft_model.enable_input_require_grads()
    peft_model.train()
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=True)
    run = torch.compile(peft_model) if compiled else peft_model

    def step():
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    warm_up = time.perf_counter() - start
    times = []
    for _ in range(7):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    emit(
        kind="train_step",
        engine=engine,
        ms=seconds * 1e3,
        tokens_per_s=4096 / seconds,
        memory_gb=torch.cuda.max_memory_allocated() / 1e9,
        warm_up_s=warm_up,
    )


def main():
    torch.manual_seed(0)
    wanted = sys.argv[1:] or ["eager", "compile", "liger"]
    if "eager" in wanted:
        measure("PEFT", model(False))
        torch.cuda.empty_cache()
    if "compile" in wanted:
        measure("PEFT + torch.compile", model(False), compiled=True)
        torch.cuda.empty_cache()
    if "liger" in wanted:
        try:
            import liger_kernel  # noqa: F401
        except ImportError:
            emit(kind="skipped", engine="PEFT + Liger", why="liger_kernel is not installed")
            return
        measure("PEFT + Liger", model(True))
        measure("PEFT + Liger + checkpointing", model(True), checkpointing=True)


if __name__ == "__main__":
    main()
