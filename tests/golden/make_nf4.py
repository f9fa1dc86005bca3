# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""Writes nf4.txt: what bitsandbytes makes of a fixed tensor in NF4, plain and double-quantised.

    python make_nf4.py > nf4.txt        (bitsandbytes 0.50, torch 2)

Numbers are f32 bits and words in hexadecimal. The tensor is 17 x 1024, its values a linear
congruential sequence times a power of two that changes from block to block, exact in f32:
nf4_test.cpp computes it again.
"""
import numpy as np
import torch
import bitsandbytes.functional as bnb

ROWS, COLUMNS, SAMPLE = 17, 1024, 17


def tensor():
    state, values = 1, []
    for i in range(ROWS * COLUMNS):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        values.append(((state >> 8) - 2**23) * 2.0 ** (i // 64 % 5 - 24))
    return torch.tensor(values, dtype=torch.float32).reshape(ROWS, COLUMNS)


def words(packed):
    """bitsandbytes puts the first value of a byte in its high half, MLX's packing in the low."""
    p = packed.numpy().reshape(-1)
    return ((p >> 4) | ((p & 15) << 4)).astype(np.uint8).view(np.uint32)


def line(values):
    a = values.numpy() if isinstance(values, torch.Tensor) else values
    a = a.reshape(-1)
    print(" ".join(f"{v:x}" for v in (a.view(np.uint32) if a.dtype == np.float32 else a)))


x = tensor()
plain, state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4")
nested, nested_state = bnb.quantize_4bit(
    x, blocksize=64, quant_type="nf4", compress_statistics=True
)
assert (plain == nested).all()
line(words(plain))
line(state.absmax)
line(nested_state.absmax)
line(torch.cat([
    nested_state.offset.reshape(1),
    nested_state.state2.code.reshape(-1),
    nested_state.state2.absmax.reshape(-1),
]))
line(bnb.dequantize_4bit(plain, state).reshape(-1)[::SAMPLE].contiguous())
line(bnb.dequantize_4bit(nested, nested_state).reshape(-1)[::SAMPLE].contiguous())
line(bnb.get_4bit_type("nf4", device="cpu"))
