# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""What the GPU peers' workers share: JSON lines, CUDA graphs timed by events."""

import json
import statistics

BUFFER_BYTES = 400e6  # of weights in rotation, so that L2 does not hold them


def emit(**row):
    print(json.dumps(row), flush=True)


def graph_us(function, launches=20, replays=9):
    """Median microseconds of one call, from replays of a graph of `launches` calls."""
    import torch

    for _ in range(3):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            function()
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / launches * 1e3)
    return statistics.median(times)


def eager_us(function, launches=30, rounds=5):
    import time

    import torch

    for _ in range(5):
        function()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(launches):
            function()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / launches * 1e6)
    return statistics.median(times)


class Rotation:
    """Indices 0 … count - 1 over and over: a different weight each call."""

    def __init__(self, weight_bytes):
        self.count = max(2, int(BUFFER_BYTES / weight_bytes))
        self.at = 0

    def __call__(self):
        self.at = (self.at + 1) % self.count
        return self.at
