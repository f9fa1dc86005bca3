# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""The card's limits through PyTorch, and LoRA linears as PyTorch runs them: base alone, with LoRA (in a
graph and eager), forward and backward, 128 adapters by gather and bmm."""

import torch
import torch.nn.functional as F
from common import Rotation, eager_us, emit, graph_us

DEVICE, BF16 = "cuda", torch.bfloat16


def randn(*shape, scale=0.02):
    return torch.randn(*shape, dtype=BF16, device=DEVICE) * scale


def limits():
    x = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    copy_us = graph_us(lambda: y.copy_(x), 5)
    del x, y
    a, b = randn(8192, 8192, scale=1.0), randn(8192, 8192, scale=1.0)
    gemm_us = graph_us(lambda: a @ b, 5)
    emit(
        kind="limits",
        device=torch.cuda.get_device_name(),
        torch=torch.__version__,
        copy_gb_per_s=2 * (1 << 30) / copy_us / 1e3,
        bf16_gemm_tflops=2 * 8192**3 / gemm_us / 1e6,
    )


def layer(k, n, rank, tokens):
    index = Rotation(k * n * 2)
    weights = [randn(n, k) for _ in range(index.count)]
    a = [randn(rank, k).requires_grad_() for _ in range(index.count)]
    b = [randn(n, rank).requires_grad_() for _ in range(index.count)]
    x = randn(tokens, k, scale=1.0)

    def base():
        return F.linear(x, weights[index()])

    def lora():
        i = index()
        return F.linear(x, weights[i]) + 2.0 * F.linear(F.linear(x, a[i]), b[i])

    with torch.no_grad():
        row = dict(base_us=graph_us(base), lora_graph_us=graph_us(lora), lora_eager_us=eager_us(lora))
    if tokens >= 512:
        row |= backward(x, weights, a, b, randn(tokens, n, scale=1.0))
    emit(kind="layer", engine="PyTorch", k=k, n=n, rank=rank, tokens=tokens, **row)


def backward(x, weights, a, b, dy):
    x = x.clone().requires_grad_()
    index = Rotation(weights[0].numel() * 2)

    def both(with_lora):
        i = index()
        y = F.linear(x, weights[i])
        wanted = [x]
        if with_lora:
            y = y + 2.0 * F.linear(F.linear(x, a[i]), b[i])
            wanted += [a[i], b[i]]
        torch.autograd.grad(y, wanted, dy)

    row = {"forward_backward_us": eager_us(lambda: both(True)), "base_forward_backward_us": eager_us(lambda: both(False))}
    with torch.no_grad():
        # The frozen base's two products without autograd's own cost: the fair denominator.
        row["base_products_us"] = graph_us(lambda: (F.linear(x, weights[index()]), dy @ weights[index.at]))
    return row


def many_adapters(tokens, k=4096, n=4096, rank=16, adapters=128):
    weight = randn(n, k)
    a, b = randn(adapters, k, rank), randn(adapters, rank, n)
    x = randn(tokens, k, scale=1.0)
    ids = torch.randint(0, adapters, (tokens,), device=DEVICE)
    with torch.no_grad():
        base = graph_us(lambda: F.linear(x, weight))
        gather = graph_us(lambda: F.linear(x, weight) + torch.bmm(torch.bmm(x[:, None], a[ids]), b[ids])[:, 0])
    emit(kind="multi", engine="PyTorch", tokens=tokens, adapters=adapters, rank=rank, base_us=base, gather_bmm_us=gather)


def main():
    torch.manual_seed(0)
    limits()
    for k, n in ((4096, 4096), (4096, 11008)):
        for rank in (8, 16, 64):
            for tokens in (1, 8, 64, 512, 4096):
                layer(k, n, rank, tokens)
    for tokens in (64, 128):
        many_adapters(tokens)


if __name__ == "__main__":
    main()
