# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""The documentation tells the truth: its commands run, its links lead somewhere, its table is current."""

import os
import pathlib
import re
import subprocess

import pytest
import results_table

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "bench").rglob("*.md")])

# Blocks that run elsewhere, and where. Anything else that a document shows is run here.
RUN_ELSEWHERE = {
    "./quickstart": "by the quickstart fixture, with the same words",
    "./run-tests": "it is what runs this test",
}
# Blocks that need PyTorch and a build of llama.cpp (8 GB): here only their --help.
NEEDS_PEERS = re.compile(r"bench/peers/\w+")


def blocks_of(path):
    return [b.strip() for b in re.findall(r"^```bash\n(.*?)^```", path.read_text(), re.M | re.S)]


BLOCKS = [
    pytest.param(block, id=f"{path.relative_to(ROOT)}:{i}")
    for path in DOCUMENTS
    for i, block in enumerate(blocks_of(path))
]


def run(block):
    # pipefail: a failing command inside $(…) or before | counts.
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block], cwd=ROOT, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"},
    )


@pytest.mark.parametrize("block", BLOCKS)
def test_command_runs(block, quickstart):
    if block in RUN_ELSEWHERE:
        assert (ROOT / block).stat().st_mode & 0o100
        return
    commands = NEEDS_PEERS.findall(block)
    if commands:
        assert block.count("\n") == 0, "show one peer command a block"
        block = f"{commands[0]} --help"
    result = run(block)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def test_the_two_commands_are_shown():
    shown = blocks_of(ROOT / "README.md")
    assert all(command in shown for command in RUN_ELSEWHERE)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if not re.match(r"https?://", target):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_exist(path):
    """`scripts/x`, `src/y/z.h` and the like in running text name files or folders of this project."""
    folders = "scripts|src|include|kernels|tests|bench|fuzz|docs|examples|cmake"
    for name in re.findall(rf"`((?:{folders})/[\w./-]*)`", path.read_text()):
        assert (ROOT / name).exists(), f"{path.name} names {name}"


def test_results_table_is_up_to_date():
    assert results_table.main(["--check"]) == 0, "run scripts/results_table.py"
