"""Shared fixtures. Tests that need real weights use `default_model`; `make model` puts them in the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from hayai.config import read_environment

DEFAULT_MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def default_model() -> Path:
    """Path of the default model's GGUF file in the cache."""
    path = read_environment().home / "models" / DEFAULT_MODEL_FILE
    if not path.exists():
        pytest.fail(f"the default model is missing: {path}; run `make model` (or `hayai pull`)")
    return path
