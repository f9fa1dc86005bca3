# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""Prefill and greedy decoding with transformers: a hand-written loop over its cache, its best case."""

import statistics
import time

import torch
from common import arguments, emit, token_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

a = arguments()
torch.set_num_threads(a["threads"])
model = AutoModelForCausalLM.from_pretrained(a["model"], dtype=getattr(torch, a["dtype"])).eval()
tokenizer = AutoTokenizer.from_pretrained(a["model"])
prompt = torch.tensor(token_rows(tokenizer, a["data"], a["prompt_tokens"])[:1])
prefill, decode = [], []
with torch.inference_mode():
    for repeat in range(a["repeats"] + 1):
        cache = DynamicCache()
        start = time.perf_counter()
        out = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        token.item()
        middle = time.perf_counter()
        for _ in range(a["tokens"]):
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            token.item()
        end = time.perf_counter()
        if repeat:  # the first warms up
            prefill.append(a["prompt_tokens"] / (middle - start))
            decode.append(a["tokens"] / (end - middle))
emit(prefill_tps=statistics.median(prefill), decode_tps=statistics.median(decode))
