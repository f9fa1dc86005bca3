# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""check_layers.py: the project passes, and each kind of planted violation does not."""

import check_layers
import pytest

HEADER = f"// {check_layers.COPYRIGHT}\n// {check_layers.LICENSE}\n"


def make_project(folder, files):
    for name in check_layers.LICENSED_FOLDERS:
        (folder / name).mkdir(exist_ok=True)
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


CLEAN = {
    "include/metal_lora/error.h": HEADER,
    "include/metal_lora/ops.h": HEADER + "#include <mlx/array.h>\n",
    "include/metal_lora/model.h": HEADER + '#include "metal_lora/ops.h"\n',
    "include/metal_lora/train.h": HEADER + '#include "metal_lora/model.h"\n',
    "include/metal_lora/generate.h": HEADER + '#include "metal_lora/model.h"\n',
    "kernels/params.h": HEADER,
    "kernels/cpu/gemm.h": HEADER + '#include "kernels/params.h"\n#include <vector>\n',
    "src/io/json.h": HEADER + '#include "metal_lora/error.h"\n#include <nlohmann/json.hpp>\n',
    "src/text/tokenizer.h": HEADER + '#include "src/io/json.h"\n',
    "src/launch/launch.h": HEADER + '#include "kernels/cpu/gemm.h"\n',
    "src/ops/linear.cpp": HEADER + '#include "metal_lora/ops.h"\n#include "src/launch/launch.h"\n',
    "src/model/llama.cpp": HEADER + '#include "metal_lora/model.h"\n#include "src/text/tokenizer.h"\n',
    "src/train/trainer.cpp": HEADER + '#include "metal_lora/train.h"\n',
    "src/cli/main.cpp": HEADER + '#include "metal_lora/train.h"\n#include "metal_lora/generate.h"\n',
}


def test_this_project_is_clean(root, capsys):
    assert check_layers.main(["--root", str(root)]) == 0, capsys.readouterr().err


def test_clean_project_passes(tmp_path):
    assert check_layers.main(["--root", str(make_project(tmp_path, CLEAN))]) == 0


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("kernels/cpu/gemm.h", "#include <mlx/array.h>", "kernels must not include MLX"),
        ("src/io/json.h", '#include "mlx/array.h"', "io must not include MLX"),
        ("src/text/tokenizer.h", "# include <mlx/ops.h>", "text must not include MLX"),
        ("kernels/cpu/gemm.h", '#include "metal_lora/ops.h"', "kernels must not include ops"),
        ("src/io/json.h", '#include "src/text/tokenizer.h"', "io must not include text"),
        ("src/text/tokenizer.h", '#include "metal_lora/model.h"', "text must not include model"),
        ("src/launch/launch.h", '#include "metal_lora/ops.h"', "launch must not include ops"),
        ("src/ops/linear.cpp", '#include "metal_lora/model.h"', "ops must not include model"),
        ("src/ops/linear.cpp", '#include "../model/../io/json.h"', "ops must not include io"),
        ("src/model/llama.cpp", '#include "metal_lora/train.h"', "model must not include train"),
        ("src/model/llama.cpp", '#include "src/launch/launch.h"', "model must not include launch"),
        ("src/train/trainer.cpp", '#include "metal_lora/generate.h"', "train must not include generate"),
        ("src/train/trainer.cpp", '#include "kernels/cpu/gemm.h"', "train must not include kernels"),
        ("src/train/trainer.cpp", '#include "src/cli/main.cpp"', "train must not include cli"),
        ("src/ops/linear.cpp", '#include "src/ops/gone.h"', "src/ops/gone.h does not exist"),
    ],
)
def test_wrong_include_fails(tmp_path, capsys, file, line, message):
    make_project(tmp_path, {**CLEAN, file: CLEAN[file] + line + "\n"})
    assert check_layers.main(["--root", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_header_without_a_layer_fails(tmp_path, capsys):
    make_project(tmp_path, {**CLEAN, "include/metal_lora/new.h": HEADER})
    assert check_layers.main(["--root", str(tmp_path)]) == 1
    assert "include/metal_lora/new.h: belongs to no layer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("src/io/json.h", "#pragma once\n"),
        ("tests/io/test_json.cpp", "// Copyright © 2026 The MetalLoRA authors.\n\n"),
        ("scripts/tool.py", "print()\n"),
        ("bench/run", "#!/usr/bin/env bash\necho\n"),
        ("quickstart", "#!/usr/bin/env bash\necho\n"),
    ],
)
def test_missing_license_header_fails(tmp_path, capsys, file, text):
    make_project(tmp_path, {**CLEAN, file: text})
    assert check_layers.main(["--root", str(tmp_path)]) == 1
    assert f"{file}: must open with the two-line licence header" in capsys.readouterr().err


def test_header_after_shebang_is_accepted(tmp_path):
    text = f"#!/usr/bin/env bash\n# {check_layers.COPYRIGHT}\n# {check_layers.LICENSE}\n"
    assert check_layers.main(["--root", str(make_project(tmp_path, {**CLEAN, "bench/run": text}))]) == 0
