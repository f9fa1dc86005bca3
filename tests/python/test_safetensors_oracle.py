# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""Our safetensors reader against the Rust reference (PyPI safetensors) on crafted files.

What we accept the reference must accept, and every valid class must be accepted by both.
METAL_LORA_BUILD names the build folder with check_safetensors.
"""

import json
import os
import pathlib
import struct
import subprocess

import numpy as np
import pytest

safetensors = pytest.importorskip("safetensors")
import safetensors.numpy  # noqa: E402


@pytest.fixture(scope="module")
def tool() -> pathlib.Path:
    build = os.environ.get("METAL_LORA_BUILD")
    if not build:
        pytest.skip("METAL_LORA_BUILD is not set")
    path = pathlib.Path(build) / "check_safetensors"
    assert path.exists(), f"{path} is not built"
    return path


def file_of(header: bytes | str, data: bytes = b"") -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: str, begin: object, end: object) -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}'


def one(dtype: str, shape: str, begin: object, end: object, size: int) -> bytes:
    return file_of(f'{{"a":{entry(dtype, shape, begin, end)}}}', b"\1" * size)


U8 = entry("U8", "[1]", 0, 1)
WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4,
          "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8}


def valid_files() -> dict[str, bytes]:
    files = {f"dtype {t}": one(t, "[2,3]", 0, 6 * w, 6 * w) for t, w in WIDTHS.items()}
    files |= {
        "no tensors": file_of("{}"),
        "padded": file_of("{}      "),
        "padded with newlines": file_of("{} \n\t\r"),
        "scalar": one("F32", "[]", 0, 4, 4),
        "empty": one("F32", "[0,7]", 0, 0, 0),
        "eight dims": one("U8", "[1,1,1,1,1,1,1,1]", 0, 1, 1),
        "metadata": file_of('{"__metadata__":{"k":"v","":"x"},"a":' + U8 + "}", b"x"),
        "metadata last": file_of('{"a":' + U8 + ',"__metadata__":{}}', b"x"),
        "misordered": file_of(
            f'{{"a":{entry("U8", "[2]", 2, 4)},"b":{entry("U8", "[2]", 0, 2)}}}', b"1234"),
        "empty between": file_of(
            f'{{"a":{entry("U8", "[2]", 0, 2)},"b":{entry("U8", "[0]", 2, 2)},'
            f'"c":{entry("U8", "[2]", 2, 4)}}}', b"1234"),
        "unaligned": file_of(
            f'{{"a":{entry("U8", "[1]", 0, 1)},"b":{entry("F32", "[1]", 1, 5)}}}', b"12345"),
        "unicode name": file_of('{"é/\\u00e9\\n":' + U8 + "}", b"x"),
        "spaced": file_of('{ "a" : { "shape" : [ 1 ] , "data_offsets" : [ 0 , 1 ] ,'
                          ' "dtype" : "U8" } }', b"x"),
    }
    return files


def malformed_files() -> dict[str, bytes]:
    headers = {
        "trailing comma": '{"a":' + U8 + ",}",
        "unclosed": '{"a":' + U8,
        "text after": '{"a":' + U8 + "}x",
        "NUL after": '{"a":' + U8 + "}\0",
        "NUL and text after": '{"a":' + U8 + "}\0xyz",
        "leading space": ' {"a":' + U8 + "}",
        "byte order mark": '\ufeff{"a":' + U8 + "}",
        "comment": '{/**/"a":' + U8 + "}",
        "array": "[" + U8 + "]",
        "lone surrogate": '{"\\ud800":' + U8 + "}",
        "control character": '{"a\n":' + U8 + "}",
        "null tensor": '{"a":null}',
        "no dtype": '{"a":{"shape":[1],"data_offsets":[0,1]}}',
        "no shape": '{"a":{"dtype":"U8","data_offsets":[0,1]}}',
        "no offsets": '{"a":{"dtype":"U8","shape":[1]}}',
        "dtype twice": '{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        "unknown member": '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1}}',
        "duplicate name": '{"a":' + U8 + ',"a":' + U8 + "}",
        "metadata twice": '{"__metadata__":{},"__metadata__":{},"a":' + U8 + "}",
        "metadata key twice": '{"__metadata__":{"k":"1","k":"2"},"a":' + U8 + "}",
        "metadata null": '{"__metadata__":null,"a":' + U8 + "}",
        "metadata number": '{"__metadata__":{"k":1},"a":' + U8 + "}",
        "shape of strings": '{"a":{"dtype":"U8","shape":["1"],"data_offsets":[0,1]}}',
        "shape nested": '{"a":{"dtype":"U8","shape":[[1]],"data_offsets":[0,1]}}',
        "three offsets": '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,1]}}',
        "one offset": '{"a":{"dtype":"U8","shape":[1],"data_offsets":[1]}}',
        "long name": '{"' + "n" * 257 + '":' + U8 + "}",
        "empty name": '{"":' + U8 + "}",
        "deep": '{"a":' + "[" * 10000,
        "tensor as array": '{"a":["U8",[1],[0,1]]}',
    }
    files = {name: file_of(header, b"x") for name, header in headers.items()}
    files |= {
        "nothing": b"",
        "seven bytes": b"\2" + b"\0" * 6,
        "zero length": b"\0" * 8,
        "beyond the end": struct.pack("<Q", 3) + b"{}",
        "invalid UTF-8": file_of(b'{"\xff":' + U8.encode() + b"}", b"x"),
        "overlap": file_of(
            f'{{"a":{entry("U8", "[4]", 0, 4)},"b":{entry("U8", "[4]", 2, 6)}}}', b"123456"),
        "hole": file_of(
            f'{{"a":{entry("U8", "[2]", 0, 2)},"b":{entry("U8", "[2]", 3, 5)}}}', b"12345"),
        "hole at the start": one("U8", "[4]", 1, 5, 5),
        "tail": one("U8", "[4]", 0, 4, 5),
        "cut": one("U8", "[4]", 0, 4, 3),
        "descending": one("U8", "[4]", 4, 0, 4),
        "negative dim": one("U8", "[-4]", 0, 4, 4),
        "negative dims": one("U8", "[-2,-2]", 0, 4, 4),
        "minus zero": one("U8", "[-0]", 0, 0, 0),
        "fraction": one("U8", "[1.9]", 0, 1, 1),
        "whole float": one("U8", "[4.0]", 0, 4, 4),
        "exponent": one("U8", "[4e0]", 0, 4, 4),
        "wraps to zero": one("F32", "[1073741824,1073741824,4]", 0, 0, 0),
        "wraps to one": one("U8", "[4294967297,4294967297]", 0, 8589934593, 4),
        "too few bytes": one("F32", "[2]", 0, 4, 4),
        "too many bytes": one("F32", "[1]", 0, 8, 8),
        "lower case": one("f32", "[1]", 0, 4, 4),
        "unknown dtype": one("F33", "[1]", 0, 4, 4),
        "nine dims": one("U8", "[1,1,1,1,1,1,1,1,1]", 0, 1, 1),
        "float8": one("F8_E4M3", "[1]", 0, 1, 1),
        "negative offset": one("U8", "[1]", -1, 0, 1),
    }
    for power in (31, 32, 63, 64):
        for change in (-1, 0, 1):
            size = 2**power + change
            files[f"dim 2^{power}{change:+d}"] = one("U8", f"[{size}]", 0, 4, 4)
            files[f"end 2^{power}{change:+d}"] = one("U8", f"[{size}]", 0, size, 4)
            files[f"range at 2^{power}{change:+d}"] = one("U8", "[4]", size, size + 4, 4)
            if size < 2**64:
                files[f"header 2^{power}{change:+d}"] = struct.pack("<Q", size) + b"{}"
    return files


def ours(tool: pathlib.Path, folder: pathlib.Path, files: dict[str, bytes]) -> dict[str, str]:
    paths = []
    for number, content in enumerate(files.values()):
        paths.append(folder / f"{number}.safetensors")
        paths[-1].write_bytes(content)
    answer = subprocess.run(
        [tool], input="\n".join(map(str, paths)) + "\n", capture_output=True, text=True, check=True)
    lines = answer.stdout.splitlines()
    assert len(lines) == len(files)
    return dict(zip(files, lines))


def reference_accepts(content: bytes) -> bool:
    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return False
    return True


def test_valid_files_are_accepted_by_both(tool, tmp_path):
    files = valid_files()
    for name, verdict in ours(tool, tmp_path, files).items():
        assert reference_accepts(files[name]), name
        assert verdict == "accept", f"{name}: {verdict}"


def test_we_accept_nothing_that_the_reference_refuses(tool, tmp_path):
    files = malformed_files()
    assert len(files) >= 60
    for name, verdict in ours(tool, tmp_path, files).items():
        assert verdict.startswith("refuse "), name
    # Changed bytes: either verdict is fine, as long as ours is the stricter.
    rng = np.random.default_rng(3)
    good = bytearray(valid_files()["empty between"])
    changed = {}
    for number in range(3000):
        content = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(0, len(good))] = rng.choice(list(b'0123456789{}[],:"-.eU8 \0\xff'))
        changed[str(number)] = bytes(content)
    for name, verdict in ours(tool, tmp_path, changed).items():
        assert verdict != "accept" or reference_accepts(changed[name]), changed[name]


def test_what_we_write_is_what_the_reference_writes(tool, tmp_path):
    rng = np.random.default_rng(5)
    tensors = {f"t{i}.{np.dtype(kind).name}": rng.integers(0, 2, (i, 3)).astype(kind)
               for i, kind in enumerate(["f4", "f2", "i8", "u1", "f8", "i2", "i4", "u8", "u4",
                                         "u2", "i1", "?", "f4"])}
    tensors['quote " and é'] = np.ones(2, np.float32)
    content = safetensors.numpy.save(tensors, {"format": "mlx"})
    (tmp_path / "from").write_bytes(content)
    subprocess.run([tool, "--write", tmp_path / "from", tmp_path / "to"], check=True)
    written = (tmp_path / "to").read_bytes()
    loaded = safetensors.numpy.load(written)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and (loaded[name] == tensor).all(), name
    length = struct.unpack("<Q", written[:8])[0]
    assert json.loads(written[8 : 8 + length])["__metadata__"] == {"format": "mlx"}
    assert written == content
