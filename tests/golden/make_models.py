# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""Tiny random checkpoints of each supported family and the logits that transformers gives.

Needs torch and transformers (5.x). Writes tests/golden/models/<name>/{config.json,model.safetensors,
expected.safetensors} and tests/golden/smollm2.json (token log-probabilities in f32).

    python make_models.py [--smollm2 HF_FOLDER]
"""

import argparse
import json
import pathlib

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = pathlib.Path(__file__).parent
BASE = dict(
    hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=61, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False,
    bos_token_id=1, eos_token_id=2, pad_token_id=2,
)
FAMILIES = {
    "llama": ("llama", {}),
    "llama3-scaled-tied": ("llama", dict(
        tie_word_embeddings=True,
        rope_parameters=dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
                             high_freq_factor=4.0, original_max_position_embeddings=16))),
    "llama-biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama-linear": ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0))),
    "mistral-window": ("mistral", dict(sliding_window=5, head_dim=8)),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", dict(
        rope_parameters=dict(rope_type="yarn", rope_theta=1000000.0, factor=4.0,
                             original_max_position_embeddings=16))),
    "qwen2-window": ("qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "qwen3": ("qwen3", dict(head_dim=16, tie_word_embeddings=True)),
}
TOKENS = [1, 17, 60, 3, 3, 42, 8, 0, 25, 59, 11, 30, 2, 7]
TEXT = "The quick brown fox jumps over the lazy dog. SELECT COUNT(*) FROM books WHERE year > 1990;"


def make(name, kind, extra):
    torch.manual_seed(sum(map(ord, name)))
    config = AutoConfig.for_model(kind, **{**BASE, **extra})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for p_name, p in model.named_parameters():
            # Weights of size ~1/sqrt(in); norms and biases away from their trivial values.
            if p.ndim == 2:
                p.normal_(0, p.shape[1] ** -0.5)
            elif "norm" in p_name:
                p.normal_(1.0, 0.2)
            else:
                p.normal_(0, 0.3)
        logits = model(torch.tensor([TOKENS])).logits[0]
    folder = HERE / "models" / name
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n")
    save_file({"tokens": torch.tensor(TOKENS, dtype=torch.int32), "logits": logits.contiguous()},
              folder / "expected.safetensors")


def smollm2(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    logprobs = torch.log_softmax(logits.double(), -1)
    chosen = [None] + [logprobs[i, ids[i + 1]].item() for i in range(len(ids) - 1)]
    top = torch.topk(logits[-1], 8)
    (HERE / "smollm2.json").write_text(json.dumps(dict(
        text=TEXT, tokens=ids, logprobs=chosen,
        last_top_ids=top.indices.tolist(), last_top_logits=top.values.tolist()), indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", help="SmolLM2-135M-Instruct as a Hugging Face folder, from its Q4_1 GGUF")
    args = parser.parse_args()
    for family, (kind, extra) in FAMILIES.items():
        make(family, kind, extra)
    if args.smollm2:
        smollm2(args.smollm2)
