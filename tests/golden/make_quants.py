# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""Writes tests/golden/quants/<type>.{blocks,f32}: random blocks and what PyPI gguf makes of them.

Usage: python tests/golden/make_quants.py   (needs gguf==0.19.0 or near, numpy)
Each .blocks holds rows x blocks of ggml data; each .f32 the dequantised numbers, little-endian.
The f16 constants are finite and include zero, negative and subnormal ones.
"""

import pathlib

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

OUT = pathlib.Path(__file__).parent / "quants"

# Byte offsets of the f16 constants in one block.
HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for name, offsets in HALVES.items():
        rng = np.random.default_rng(sum(map(ord, name)))
        quant = GGMLQuantizationType[name]
        elements, block_bytes = GGML_QUANT_SIZES[quant]
        count = 1024 // elements
        blocks = rng.integers(0, 256, (count, block_bytes), dtype=np.uint8)
        for offset in offsets:
            halves = (rng.standard_normal(count) * 0.02).astype(np.float16)
            halves[0] = np.float16(6e-8)  # the least subnormal
            if count > 8:
                halves[1] = np.float16(0.0)
                halves[2] = np.float16(-500.0)
            blocks[:, offset : offset + 2] = halves.view(np.uint8).reshape(count, 2)
        values = dequantize(blocks, quant).astype("<f4").reshape(-1)
        assert values.size == count * elements
        (OUT / f"{name.lower()}.blocks").write_bytes(blocks.tobytes())
        (OUT / f"{name.lower()}.f32").write_bytes(values.tobytes())


if __name__ == "__main__":
    main()
