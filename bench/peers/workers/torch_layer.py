# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""One linear layer with PyTorch, plain and with PEFT's LoRA, forward: milliseconds."""

import torch
from common import arguments, emit, median_ms
from peft import LoraConfig, get_peft_model

a = arguments()
torch.set_num_threads(a["threads"])
dtype = getattr(torch, a["dtype"])


class Wrapper(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear


def forward_ms(tokens, with_lora):
    layer = torch.nn.Linear(a["width"], a["width"], bias=False).to(dtype)
    if with_lora:
        config = LoraConfig(r=a["rank"], lora_alpha=2 * a["rank"], target_modules=["linear"])
        peft_model = get_peft_model(Wrapper(layer), config, autocast_adapter_dtype=False)
        layer = peft_model.base_model.model.linear.to(dtype)
    layer.eval()
    x = torch.randn(tokens, a["width"], dtype=dtype)
    with torch.inference_mode():
        return median_ms(lambda: layer(x))


emit(**{
    f"M{tokens}{'_lora' if with_lora else ''}_ms": forward_ms(tokens, with_lora)
    for tokens in a["tokens"]
    for with_lora in (False, True)
})
