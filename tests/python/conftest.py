# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""What the Python tests share: where things are, the program, the model, one quickstart run."""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import get_model  # noqa: E402

# The comparisons with reference implementations drive helper programs of the build folder.
os.environ.setdefault("METAL_LORA_BUILD", str(ROOT / "build"))
if "METAL_LORA_MODEL" in os.environ:
    os.environ.setdefault("METAL_LORA_SMOLLM2", os.environ["METAL_LORA_MODEL"])


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def metal_lora():
    """Path of the program under test: $METAL_LORA_PROGRAM, or what scripts/setup builds."""
    program = pathlib.Path(os.environ.get("METAL_LORA_PROGRAM", ROOT / "build" / "metal-lora"))
    assert program.is_file(), f"{program} is not built: run scripts/setup"
    return program


@pytest.fixture(scope="session")
def model_path():
    """Path of SmolLM2-135M-Instruct, fetched on the first use."""
    given = os.environ.get("METAL_LORA_MODEL")
    if given:
        return pathlib.Path(given)
    return get_model.fetch(get_model.MODELS["smollm2-135m-instruct"], get_model.cache_root())


@dataclasses.dataclass(frozen=True)
class QuickstartRun:
    folder: pathlib.Path
    output: str


@pytest.fixture(scope="session")
def quickstart(metal_lora, model_path):
    """`./quickstart` as the README shows it, run once for all tests that need its results.

    Starts from an empty quickstart-out/: commands of the documentation write there, some of them to
    folders that must be new.
    """
    shutil.rmtree(ROOT / "quickstart-out", ignore_errors=True)
    result = subprocess.run(
        ["./quickstart"], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return QuickstartRun(ROOT / "quickstart-out", result.stdout)
