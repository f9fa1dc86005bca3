# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""A real model on the Metal kernels, run by the emulator, says what it says on the CPU."""

import json
import os
import subprocess


def generate(program, model, backend, *flags):
    result = subprocess.run(
        [program, "generate", "--model", model, "--prompt", "The capital of France is", "--max-tokens", "3",
         "--temp", "0", "--dtype", "float32", "--json", *flags],
        capture_output=True, text=True, env={**os.environ, "METAL_LORA_BACKEND": backend}, timeout=900)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.strip().splitlines()[-1])["tokens"]


def test_smollm2_generates_the_cpus_tokens(metal_lora, model_path):
    assert generate(metal_lora, model_path, "emulator") == generate(metal_lora, model_path, "cpu")


def test_a_backend_that_is_not_there_is_refused_by_name(metal_lora, model_path):
    devices = subprocess.run([metal_lora, "inspect", "--devices", "--json"], capture_output=True, text=True)
    cases = [("metal", "needs an Apple GPU"), ("vulkan", "got vulkan")]
    if json.loads(devices.stdout)["backend"] != "cuda":
        cases.append(("cuda", "cuda cannot run here"))
    for backend, expected in cases:
        result = subprocess.run(
            [metal_lora, "generate", "--model", model_path, "--prompt", "x", "--json"],
            capture_output=True, text=True, env={**os.environ, "METAL_LORA_BACKEND": backend})
        assert result.returncode == 2
        assert expected in json.loads(result.stdout)["error"]["message"]
