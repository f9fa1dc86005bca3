# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""LoRA steps with transformers and PEFT. dtype: float32, bfloat16, or autocast (f32 weights, bf16 math)."""

import statistics

import torch
from common import arguments, emit, seconds_of, token_rows
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

a = arguments()
torch.set_num_threads(a["threads"])
torch.manual_seed(0)
weights = torch.bfloat16 if a["dtype"] == "bfloat16" else torch.float32
model = AutoModelForCausalLM.from_pretrained(a["model"], dtype=weights)
model.config.use_cache = False
config = LoraConfig(r=a["rank"], lora_alpha=2 * a["rank"], lora_dropout=0.0, target_modules="all-linear")
model = get_peft_model(model, config)
model.train()
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-4)
rows = torch.tensor(token_rows(AutoTokenizer.from_pretrained(a["model"]), a["data"], a["length"]))


def step(index):
    first = index * a["batch"] % (len(rows) - a["batch"] + 1)
    batch = rows[first : first + a["batch"]]
    with torch.autocast("cpu", torch.bfloat16, enabled=a["dtype"] == "autocast"):
        loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


times = [seconds_of(lambda i=i: step(i)) for i in range(a["steps"])][2:]
emit(tokens_per_second=a["batch"] * a["length"] / statistics.median(times))
