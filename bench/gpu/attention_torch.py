# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""PyTorch's scaled_dot_product_attention on the shapes of attention_bench."""
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def graph_us(f, launches=20, replays=9):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(launches):
            f()
    times = []
    for _ in range(replays + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / launches)
    return statistics.median(times[2:])


def train(batch, length, q_heads, kv_heads, dim, backend):
    def rand(heads):
        x = torch.randn(batch, length, heads, dim, device="cuda", dtype=torch.bfloat16)
        return x.transpose(1, 2).requires_grad_()

    q, k, v = rand(q_heads), rand(kv_heads), rand(kv_heads)
    g = torch.randn_like(q)
    gqa = q_heads != kv_heads

    def forward():
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=gqa
        )

    flops = 4.0 * batch * q_heads * dim * 0.5 * length * length
    with sdpa_kernel(backend):
        one = graph_us(lambda: forward())
        both = graph_us(lambda: torch.autograd.grad(forward(), (q, k, v), g))
    back = both - one
    print(
        f"torch {backend.name} {batch} x {length}, heads {q_heads}/{kv_heads}, dim {dim}: forward "
        f"{one:.1f} us {flops / one * 1e-6:.0f} TFLOP/s, backward {back:.1f} us "
        f"{2.5 * flops / back * 1e-6:.0f} TFLOP/s"
    )


for shape in [(4, 1024, 32, 8, 64), (4, 1024, 32, 32, 64), (4, 1024, 32, 8, 128)]:
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            train(*shape, backend)
        except Exception as error:  # a backend that refuses the shape
            print("torch", backend.name, shape, str(error).splitlines()[0][:100])
