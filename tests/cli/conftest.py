"""`hayai` as a user runs it: a process, its output and its exit code."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from chat_model import write_chat_model
from hayai_process import COMMAND, Hayai


@pytest.fixture(scope="session")
def chat_model(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(default_model, tmp_path_factory.mktemp("cli") / "tiny-chat.gguf")


@pytest.fixture
def hayai() -> Hayai:
    """hayai("run", "-m", path, stdin="...", env={...}) -> the finished process."""

    def call(
        *args: str | Path, stdin: str = "", env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *map(str, args)],
            input=stdin,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return call
