#!/usr/bin/env python3
# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""Fails on an #include that goes the wrong way between layers, and on a missing licence header.

    io <- text <- model <- {train, generate} <- cli        kernels <- launch <- ops <- model

Kernels, io and text include no MLX header: they are tested, fuzzed and timed without a graph.
"""

import argparse
import pathlib
import posixpath
import re
import sys

# What each layer may include besides itself. `base` is the error table and other headers without
# dependencies, which everybody may use.
MAY_INCLUDE = {
    "base": set(),
    "kernels": {"base"},
    "io": {"base"},
    "text": {"base", "io"},
    "launch": {"base", "kernels"},
    "ops": {"base", "kernels", "launch"},
    "model": {"base", "io", "text", "ops"},
    "train": {"base", "io", "text", "ops", "model"},
    "generate": {"base", "io", "text", "ops", "model"},
    # The top: it also sets the number of threads, names the instruction set and times kernels.
    "cli": {"base", "io", "text", "kernels", "launch", "ops", "model", "train", "generate"},
}
WITHOUT_MLX = {"base", "kernels", "io", "text"}

# Headers whose folder does not say their layer.
LAYER_OF_HEADER = {
    "kernels/params.h": "base",
    "kernels/nf4.h": "base",
    "include/metal_lora/error.h": "base",
    "include/metal_lora/memory.h": "base",
    "include/metal_lora/weight.h": "ops",
    "include/metal_lora/ops.h": "ops",
    "include/metal_lora/model.h": "model",
    "include/metal_lora/adapter.h": "model",
    "include/metal_lora/train.h": "train",
    "include/metal_lora/generate.h": "generate",
}

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
CPP_SUFFIXES = {".h", ".cpp", ".cc", ".inl"}
SOURCE_FOLDERS = ("include", "kernels", "src")
LICENSED_FOLDERS = (*SOURCE_FOLDERS, "emulator", "tests", "fuzz", "bench", "scripts", "examples")
LICENSED_ROOT_FILES = ("quickstart", "run-tests", ".ci/run")
COPYRIGHT = "Copyright © 2026 The MetalLoRA authors."
LICENSE = "SPDX-License-Identifier: MIT"


def layer_of(path):
    """Layer of a path relative to the root, or None if it belongs to none."""
    if path in LAYER_OF_HEADER:
        return LAYER_OF_HEADER[path]
    parts = path.split("/")
    if parts[0] == "kernels":
        return "kernels"
    if parts[0] == "src" and len(parts) > 2 and parts[1] in MAY_INCLUDE:
        return parts[1]
    return None


def resolve(root, file, name):
    """Path relative to the root of the project's header `name` as `file` includes it, or None."""
    for candidate in (name, f"include/{name}", f"{posixpath.dirname(file)}/{name}"):
        candidate = posixpath.normpath(candidate)
        if (root / candidate).is_file():
            return candidate
    return None


def check_include(root, file, line_number, is_system, name):
    """The violation in one #include of a file that belongs to a layer, or None."""
    layer = layer_of(file)
    where = f"{file}:{line_number}"
    if name.startswith("mlx/"):
        if layer in WITHOUT_MLX:
            return f"{where}: {layer} must not include MLX but includes {name}"
        return None
    target = resolve(root, file, name)
    if target is None:
        if not is_system and name.split("/")[0] in ("src", "kernels", "metal_lora"):
            return f"{where}: {name} does not exist"
        return None
    target_layer = layer_of(target)
    if target_layer is None:
        return f"{where}: {target} belongs to no layer (name it in scripts/check_layers.py)"
    if target_layer != layer and target_layer not in MAY_INCLUDE[layer]:
        return f"{where}: {layer} must not include {target_layer} but includes {name}"
    return None


def read_lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def files_under(root, folders, suffixes=None):
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                if suffixes is None or path.suffix in suffixes:
                    yield path


def layer_violations(root):
    for path in files_under(root, SOURCE_FOLDERS, CPP_SUFFIXES):
        file = path.relative_to(root).as_posix()
        if layer_of(file) is None:
            yield f"{file}: belongs to no layer (name it in scripts/check_layers.py)"
            continue
        for number, line in enumerate(read_lines(path), 1):
            match = INCLUDE.match(line)
            if match:
                violation = check_include(root, file, number, match[1] == "<", match[2])
                if violation:
                    yield violation


def needs_header(path):
    if path.suffix in CPP_SUFFIXES | {".metal", ".py", ".sh"}:
        return True
    with open(path, "rb") as file:
        return file.read(2) == b"#!"


def license_violations(root):
    paths = list(files_under(root, LICENSED_FOLDERS))
    paths += [root / name for name in LICENSED_ROOT_FILES if (root / name).is_file()]
    for path in paths:
        if not needs_header(path):
            continue
        lines = read_lines(path)
        start = 1 if lines and lines[0].startswith("#!") else 0
        mark = "//" if path.suffix in CPP_SUFFIXES | {".metal"} else "#"
        if lines[start : start + 2] != [f"{mark} {COPYRIGHT}", f"{mark} {LICENSE}"]:
            yield f"{path.relative_to(root).as_posix()}: must open with the two-line licence header"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path(__file__).parents[1])
    root = parser.parse_args(arguments).root
    violations = [*layer_violations(root), *license_violations(root)]
    for violation in violations:
        print(violation, file=sys.stderr)
    print(f"check_layers: {len(violations)} violations" if violations else "check_layers: ok")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
