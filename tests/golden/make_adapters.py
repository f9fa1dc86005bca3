# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""Adapters that PEFT and mlx-lm write for the tiny llama of make_models.py, with the logits they give.

Needs torch, transformers, peft and mlx-lm. Writes tests/golden/adapters/{peft,mlx-lm}/.

    python make_adapters.py
    python make_adapters.py --check DIR    # DIR/{peft,mlx-lm}: adapters that this project wrote; prints
                                           # the largest difference of the peers' logits from the golden
"""

import argparse
import json
import pathlib

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

HERE = pathlib.Path(__file__).parent
MODEL = HERE / "models" / "llama"
OUT = HERE / "adapters"
TOKENS = [3, 14, 15, 9, 26, 5, 35, 8, 58]


def peft_logits(folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


def make_peft():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "gate_proj", "down_proj"],
        rank_pattern={"layers.1.mlp.gate_proj": 2}, alpha_pattern={"down_proj": 5}, lora_dropout=0.1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(OUT / "peft")
    (OUT / "peft" / "README.md").unlink(missing_ok=True)
    path = OUT / "peft" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = "llama"  # not this machine's path
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def mlx_logits(folder):
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(MODEL)
    model = load_adapters(model, str(folder))
    model.eval()
    return np.array(model(mx.array([TOKENS]))[0].astype(mx.float32))


def make_mlx_lm():
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    mx.random.seed(6)
    model, _ = load_model(MODEL)
    model.freeze()
    lora = {"rank": 3, "scale": 1.7, "dropout": 0.0, "keys": ["self_attn.v_proj", "mlp.up_proj"]}
    linear_to_lora_layers(model, 1, lora)
    tensors = {}
    for name, value in tree_flatten(model.trainable_parameters()):
        value = mx.random.normal(value.shape) * 0.3 if name.endswith("lora_b") else value
        tensors[name] = np.array(value.astype(mx.float32))
    folder = OUT / "mlx-lm"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": lora, "model": "llama"}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=4) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", type=pathlib.Path)
    options = parser.parse_args()
    if options.check:
        for name, logits in (("peft", peft_logits), ("mlx-lm", mlx_logits)):
            for golden in ("peft", "mlx-lm"):
                expected = load_file(OUT / golden / "expected.safetensors")["logits"]
                got = logits(options.check / f"{golden}-as-{name}")
                print(f"{golden} as {name}: largest difference {np.abs(got - expected).max():.2e}")
        return
    for make, logits, name in ((make_peft, peft_logits, "peft"), (make_mlx_lm, mlx_logits, "mlx-lm")):
        make()
        save_file({"tokens": np.array(TOKENS, np.int32), "logits": logits(OUT / name)},
                  OUT / name / "expected.safetensors")


if __name__ == "__main__":
    main()
