"""Shared fixtures. Tests that need real weights use `default_model`; `make model` puts them in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hayai.config import read_environment

DEFAULT_MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Servers under test keep their state (keys, ledger, batches) in a folder of their own."""
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder))
        patch.delenv("HAYAI_DATABASE", raising=False)
        yield folder


@pytest.fixture(scope="session")
def default_model() -> Path:
    """Path of the default model's GGUF file in the cache."""
    path = read_environment().home / "models" / DEFAULT_MODEL_FILE
    if not path.exists():
        pytest.fail(f"the default model is missing: {path}; run `make model` (or `hayai pull`)")
    return path
