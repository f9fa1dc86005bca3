# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""Writes the seed inputs of fuzz/corpus/ for the io targets: small valid files of each kind.

Usage: python fuzz/make_corpus.py   (needs gguf, numpy, safetensors)
"""

import json
import pathlib

import gguf
import numpy as np
import safetensors.numpy

CORPUS = pathlib.Path(__file__).parent / "corpus"


def main() -> None:
    for target in ("safetensors", "gguf", "json", "jsonl"):
        (CORPUS / f"fuzz_{target}").mkdir(parents=True, exist_ok=True)
    tensors = {
        "model.layers.0.self_attn.q_proj.lora_a": np.ones((4, 2), np.float32),
        "model.layers.0.self_attn.q_proj.lora_b": np.zeros((2, 4), np.float16),
        "ids": np.arange(3, dtype=np.int64),
        "empty": np.zeros((0, 2), np.uint8),
    }
    adapter = safetensors.numpy.save(tensors, {"format": "mlx"})
    (CORPUS / "fuzz_safetensors" / "adapter").write_bytes(adapter)
    (CORPUS / "fuzz_safetensors" / "none").write_bytes(safetensors.numpy.save({}))

    path = CORPUS / "fuzz_gguf" / "model"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_rope_freq_base(1e5)
    writer.add_token_list(["a", "b", "é"])
    writer.add_token_types([1, 1, 3])
    writer.add_add_bos_token(False)
    writer.add_tensor("norm", np.ones(4, np.float32))
    for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"):
        quant = gguf.GGMLQuantizationType[kind]
        elements, block_bytes = gguf.GGML_QUANT_SIZES[quant]
        data = np.arange(block_bytes, dtype=np.uint8).reshape(1, -1)
        writer.add_tensor(kind, data, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    config = {"model_type": "llama", "hidden_size": 576, "rope_theta": 1e5, "tie": True,
              "keys": ["q_proj"], "nested": {"rank": 8, "none": None}, "é\n": [[-1, 2.5]]}
    (CORPUS / "fuzz_json" / "config").write_text(json.dumps(config))
    rows = ['{"text": "a"}', "", '{"prompt": "é", "completion": "b"}']
    (CORPUS / "fuzz_jsonl" / "rows").write_bytes("\r\n".join(rows).encode())
    (CORPUS / "fuzz_jsonl" / "bom").write_bytes(b"\xef\xbb\xbf" + rows[0].encode() + b"\n{")


if __name__ == "__main__":
    main()
