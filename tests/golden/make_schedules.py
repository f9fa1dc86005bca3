#!/usr/bin/env python3
# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""Writes schedules.json: learning rates of MLX's schedulers, joined with warm-up as mlx-lm does."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim

CASES = [
    {"name": "cosine_decay", "arguments": [1e-3, 50]},
    {"name": "cosine_decay", "arguments": [1e-5, 100, 1e-7], "warmup": 10, "warmup_init": 1e-7},
    {"name": "linear_schedule", "arguments": [1e-3, 1e-5, 40]},
    {"name": "linear_schedule", "arguments": [0.0, 2e-4, 30], "warmup": 5},
    {"name": "exponential_decay", "arguments": [1e-1, 0.9]},
    {"name": "exponential_decay", "arguments": [1e-2, 0.99], "warmup": 20},
    {"name": "step_decay", "arguments": [1e-1, 0.5, 7]},
    {"name": "step_decay", "arguments": [3e-4, 0.9, 10], "warmup": 1, "warmup_init": 1e-6},
]
STEPS = [0, 1, 2, 5, 6, 7, 9, 10, 11, 12, 20, 21, 22, 39, 40, 49, 50, 51, 99, 110, 111, 112, 200]


def build(case):
    """mlx_lm.tuner.utils.build_schedule, in its own few lines."""
    arguments = case["arguments"]
    schedule = getattr(optim.schedulers, case["name"])(*arguments)
    warmup = case.get("warmup", 0)
    if not warmup:
        return schedule
    start = optim.schedulers.linear_schedule(case.get("warmup_init", 0.0), arguments[0], warmup)
    return optim.schedulers.join_schedules([start, schedule], [warmup + 1])


def value(schedule, step):
    out = schedule(mx.array(step))
    return float(out.item() if isinstance(out, mx.array) else out)


def main():
    out = [dict(case, steps=STEPS, values=[value(build(case), s) for s in STEPS]) for case in CASES]
    joined = optim.join_schedules(
        [optim.linear_schedule(0, 1e-1, 10), optim.cosine_decay(1e-1, 200)], [10]
    )
    out.append(
        {
            "name": "join_schedules",
            "schedules": [
                {"name": "linear_schedule", "arguments": [0, 1e-1, 10]},
                {"name": "cosine_decay", "arguments": [1e-1, 200]},
            ],
            "boundaries": [10],
            "steps": STEPS,
            "values": [value(joined, s) for s in STEPS],
        }
    )
    Path(__file__).with_name("schedules.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
