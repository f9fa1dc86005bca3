# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""What the peers' workers share. A worker measures one engine once and prints one JSON line."""

import json
import resource
import statistics
import sys
import time


def arguments():
    """The measurement's parameters: one JSON object as the only argument."""
    return json.loads(sys.argv[1])


def token_rows(tokenizer, path, length):
    """Rows of exactly `length` token ids, from the texts of a .jsonl file."""
    with open(path, encoding="utf-8") as file:
        rows = [tokenizer.encode(json.loads(line)["text"])[:length] for line in file]
    assert all(len(row) == length for row in rows), "a text is too short"
    return rows


def seconds_of(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def median_ms(function, seconds=0.5, at_least=30):
    """Median of at least 30 runs after 3 to warm up."""
    for _ in range(3):
        function()
    times, start = [], time.perf_counter()
    while len(times) < at_least or time.perf_counter() - start < seconds:
        times.append(seconds_of(function) * 1e3)
    return statistics.median(times)


def emit(**metrics):
    metrics["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(metrics), flush=True)
