"""A tiny random model in a file, and the backends that the contracts are checked on."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from hayai.config import ModelConfig
from hayai.weights.gguf_writer import llama_metadata, random_llama, write_gguf

BACKENDS = ["reference"] + (["cpu"] if importlib.util.find_spec("hayai._native") else [])

TINY = ModelConfig(
    architecture="llama",
    vocab_size=512,
    hidden_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    ffn_size=256,
    context_length=512,
    norm_eps=1e-5,
)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that can run here: the reference, and the native one where it is built."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama in Q8_0 with random weights and no vocabulary."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    return write_gguf(path, llama_metadata(TINY), random_llama(TINY, "q8_0", seed=3))
