# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""./quickstart keeps its promises: what it measures, what it leaves, what it refuses."""

import json
import re
import subprocess

import pytest
import sql_judge


def accuracy(quickstart, name, label):
    verdicts = sql_judge.judge_files(
        quickstart.folder / "data" / f"{name}.jsonl",
        quickstart.folder / "answers" / f"{name}.{label}.jsonl",
    )
    right, asked = sql_judge.accuracy_by_category(verdicts)["all"]
    return right / asked


def test_fine_tuning_takes_accuracy_from_nothing_to_nearly_all(quickstart):
    assert accuracy(quickstart, "test", "before") <= 0.05
    assert accuracy(quickstart, "test", "after") >= 0.95


def test_tables_never_trained_on_are_reported_and_mostly_right(quickstart):
    assert "two tables never trained on" in quickstart.output
    assert accuracy(quickstart, "unseen", "before") <= 0.05
    assert accuracy(quickstart, "unseen", "after") >= 0.75


def test_output_names_what_it_left(quickstart):
    for name in ("adapter/adapters.safetensors", "adapter/adapter_config.json", "adapter/report.html"):
        assert (quickstart.folder / name).stat().st_size > 0
    assert "quickstart-out/adapter/report.html" in quickstart.output
    assert "\x1b[" not in quickstart.output  # no colours: not a terminal


def test_report_needs_no_network(quickstart):
    text = (quickstart.folder / "adapter" / "report.html").read_text()
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", text)
    assert not re.search(r"@import|url\(\s*[\"']?https?:", text)


def test_answers_are_in_the_order_of_the_questions(quickstart):
    answers = quickstart.folder / "answers"
    for name in ("test", "unseen"):
        prompts = (answers / f"{name}.prompts.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in (answers / f"{name}.after.jsonl").read_text().splitlines()]
        assert len(rows) == len(prompts)
        assert all(len(row["tokens"]) <= 32 for row in rows)


@pytest.mark.parametrize("command", ["quickstart", "run-tests", "scripts/setup", "scripts/get-model"])
def test_help_explains(root, command):
    result = subprocess.run([root / command, "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout.lower().startswith("usage")


@pytest.mark.parametrize(
    ("command", "arguments", "code"),
    [
        ("quickstart", ["--nonsense"], 2),
        ("quickstart", ["--seed"], 2),
        ("quickstart", ["--seed", "x"], 2),
        ("quickstart", ["--model", "/no/such/model"], 3),
        ("run-tests", ["--only", "nonsense"], 2),
        ("run-tests", ["--fuzz-seconds", "soon"], 2),
        ("scripts/setup", ["--nonsense"], 2),
    ],
)
def test_wrong_arguments_are_refused_at_once(root, command, arguments, code):
    result = subprocess.run([root / command, *arguments], capture_output=True, text=True, timeout=20)
    assert result.returncode == code
    assert result.stdout == "" and f"[{command.split('/')[-1]}]" in result.stderr
