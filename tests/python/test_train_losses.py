# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""Ten losses on SmolLM2 in f32 equal PEFT's, from the same weights and batches."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file


@pytest.fixture(scope="module")
def fixture(root):
    sys.path.insert(0, str(root / "tests" / "golden"))
    import peft_fixture

    return peft_fixture


def write_adapter(fixture, folder):
    tensors, checksum = {}, 0.0
    for path, (a, b) in fixture.initial_adapter().items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = a
        tensors[f"base_model.model.{path}.lora_B.weight"] = b
        checksum += float(np.abs(a).sum(dtype=np.float64))
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": fixture.RANK,
        "lora_alpha": fixture.ALPHA,
        "target_modules": fixture.TARGETS,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder / "adapter_model.safetensors", checksum


def train(program, *arguments):
    command = [str(program), "train", "--json", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_ten_losses_equal_pefts(root, metal_lora, model_path, fixture, tmp_path):
    golden = json.loads((root / "tests" / "golden" / "peft_losses.json").read_text())
    data = tmp_path / "data"
    data.mkdir()
    lines = [json.dumps({"text": text}) for text in fixture.TEXTS]
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")
    adapter, checksum = write_adapter(fixture, tmp_path / "initial")
    assert checksum == pytest.approx(golden["adapter_checksum"], rel=1e-12)

    # Four samples are one batch, so their order does not matter.
    lines = train(
        metal_lora, "--model", model_path, "--data", data, "--dtype", "float32",
        "--resume-adapter-file", adapter, "--optimizer", "adamw",
        "--learning-rate", fixture.LEARNING_RATE, "--batch-size", 4, "--iters", fixture.STEPS,
        "--steps-per-report", 1, "--adapter-path", tmp_path / "out",
    )  # fmt: skip
    losses = [line["train_loss"] for line in lines if "train_loss" in line]
    assert len(losses) == fixture.STEPS
    # The bar of the project; f32 rounding alone accounts for about a hundredth of it.
    assert np.abs(np.array(losses) - golden["losses"]).max() <= 1e-3
    # Every token but each text's first is trained on, EOS included.
    trained = sum(len(row) - 1 for row in golden["tokens"])
    reports = [line for line in lines if "trained_tokens" in line and "train_loss" in line]
    assert [report["trained_tokens"] for report in reports] == [
        trained * (i + 1) for i in range(fixture.STEPS)
    ]
    assert {"iteration", "learning_rate", "tokens_per_second", "peak_memory_bytes"} <= set(reports[0])
