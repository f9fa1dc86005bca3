#!/usr/bin/env python3
# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""Writes datasets.json: what mlx-lm's datasets make of a few rows, with a byte-level tokenizer.

Needs mlx-lm and transformers. The tokenizer is that of tests/support/tiny_model.h.
"""

import json
import tempfile
from pathlib import Path

from mlx_lm.tuner.datasets import create_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
SETS = {
    "completions": [
        {"prompt": "2+2?", "completion": "4"},
        {"prompt": "Grüße, 你好", "completion": "👋 hello\nthere"},
        {"prompt": "", "completion": "x"},
    ],
    "chat": [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        {
            "messages": [
                {"role": "system", "content": "be short"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "d"},
            ]
        },
        {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "no answer"}]},
    ],
    "text": [{"text": "plain text"}, {"text": "ends itself<|im_end|>"}, {"text": "ünïcode 😀"}],
}


def byte_tokens():
    out, following = [], 256
    for b in range(256):
        if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174:
            out.append(chr(b))
        else:
            out.append(chr(following))
            following += 1
    return out


def make_tokenizer():
    vocab = {t: i for i, t in enumerate(byte_tokens() + SPECIAL)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "tokenizer.json")
        tokenizer.save(path)
        fast = PreTrainedTokenizerFast(
            tokenizer_file=path, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[1]
        )
    fast.chat_template = TEMPLATE
    return fast


class Config:
    def __init__(self, mask_prompt):
        self.mask_prompt = mask_prompt


def main():
    tokenizer = make_tokenizer()
    out = []
    for name, rows in SETS.items():
        for mask in (False, True):
            if name == "text" and mask:
                continue
            dataset = create_dataset(rows, tokenizer, Config(mask))
            made = [dataset.process(dict(row)) for row in rows]
            out.append(
                {
                    "kind": name,
                    "mask_prompt": mask,
                    "rows": rows,
                    "tokens": [list(map(int, tokens)) for tokens, _ in made],
                    "offsets": [int(offset) for _, offset in made],
                }
            )
    path = Path(__file__).with_name("datasets.json")
    path.write_text(json.dumps(out, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
