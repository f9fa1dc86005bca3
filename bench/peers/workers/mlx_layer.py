# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""One linear layer with MLX, plain and with mlx-lm's LoRA, forward, on the CPU: milliseconds."""

import mlx.core as mx
import mlx.nn as nn
from common import arguments, emit, median_ms
from mlx_lm.tuner.lora import LoRALinear

a = arguments()
mx.set_default_device(mx.cpu)
dtype = getattr(mx, a["dtype"])


def forward_ms(tokens, with_lora):
    layer = nn.Linear(a["width"], a["width"], bias=False)
    if with_lora:
        layer = LoRALinear.from_base(layer, r=a["rank"], scale=2.0)
    layer.set_dtype(dtype)
    x = mx.random.normal((tokens, a["width"])).astype(dtype)
    mx.eval(layer.parameters(), x)
    return median_ms(lambda: mx.eval(layer(x)))


emit(**{
    f"M{tokens}{'_lora' if with_lora else ''}_ms": forward_ms(tokens, with_lora)
    for tokens in a["tokens"]
    for with_lora in (False, True)
})
