# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""Writes quantize.txt: what mx.quantize makes of small inputs (pip install "mlx[cpu]==0.32.4").

One block per case: a line "bits group dtype rows columns", then hexadecimal words of the input
(f32 bits), the packed weights, the scales and the biases (f32 bits of their values), a line each.
"""

from pathlib import Path

import mlx.core as mx
import numpy as np


def cases():
    rng = np.random.default_rng(3)
    for bits in (4, 8):
        for group in (32, 64, 128):
            x = rng.standard_normal((3, 2 * group)).astype(np.float32)
            x[1] = np.abs(x[1]) + 1  # all of one sign
            x[2, :group] = 0.25  # constant
            x[2, group:] = 0.0
            x[2, group + 1] = -1.0
            for dtype in (mx.float32, mx.float16, mx.bfloat16):
                yield bits, group, dtype, mx.array(x).astype(dtype)
    ties = (np.arange(64, dtype=np.float32).reshape(2, 32) - 20) / 2
    yield 4, 32, mx.float32, mx.array(ties)


def words(a):
    return " ".join(f"{v:x}" for v in np.asarray(a).reshape(-1).view(np.uint32))


def main():
    names = {mx.float32: "f32", mx.float16: "f16", mx.bfloat16: "bf16"}
    lines = []
    for bits, group, dtype, x in cases():
        q, scales, biases = mx.quantize(x, group_size=group, bits=bits, stream=mx.cpu)
        lines.append(f"{bits} {group} {names[dtype]} {x.shape[0]} {x.shape[1]}")
        lines.append(words(x.astype(mx.float32)))
        lines.append(words(q))
        lines.append(words(scales.astype(mx.float32)))
        lines.append(words(biases.astype(mx.float32)))
    (Path(__file__).parent / "quantize.txt").write_text("\n".join(lines) + "\n")


main()
