# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""What PEFT's golden losses and our own run have in common: data, settings and initial weights."""

import numpy as np

TEXTS = [
    "The tide tables for the harbour are printed every spring, and the fishermen keep them pinned "
    "beside the door until the paper turns yellow.",
    "SELECT name, population FROM cities WHERE country = 'Peru' ORDER BY population DESC LIMIT 3;",
    "Low-rank adaptation adds the product of two thin matrices to a frozen weight.",
    "Question: How many legs do three spiders have? Answer: Twenty-four, eight for each of them.",
]
RANK = 8
ALPHA = 16.0
LEARNING_RATE = 5e-4
STEPS = 10
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# SmolLM2-135M: outputs and inputs of the linears of a layer.
SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
LAYERS = 30


def initial_adapter():
    """{path: (A [rank, in], B [out, rank])} from a PCG64 stream, which numpy keeps stable."""
    generator = np.random.Generator(np.random.PCG64(7))
    adapter = {}
    for layer in range(LAYERS):
        for name, (out_features, in_features) in SHAPES.items():
            a = (generator.random((RANK, in_features)) * 2 - 1) / np.sqrt(in_features)
            b = (generator.random((out_features, RANK)) * 2 - 1) * 1e-3
            path = f"model.layers.{layer}.{name}"
            adapter[path] = (a.astype(np.float32), b.astype(np.float32))
    return adapter
