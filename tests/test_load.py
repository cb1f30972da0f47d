"""The composition root: options, defaults, what it prints, what it refuses."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from hayai.backends.base import KV_FORMATS
from hayai.config import EngineConfig, ModelConfig
from hayai.errors import ConfigError, ModelError
from hayai.load import LoadedModel, kv_bytes_per_token, load_model
from hayai.weights.gguf_writer import llama_metadata, random_llama, write_gguf

TINY = ModelConfig("llama", 64, 32, 1, 2, 1, 16, 64, 96, 1e-5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("load") / "tiny-model.gguf"
    metadata = llama_metadata(TINY) | {"tokenizer.ggml.eos_token_id": 7}
    return write_gguf(path, metadata, random_llama(TINY))


def load(path: Path, **options: object) -> LoadedModel:
    return load_model(EngineConfig(model=str(path), backend="reference", **options))  # type: ignore[arg-type]


def test_defaults_are_resolved(tiny: Path) -> None:
    with closing(load(tiny).engine) as engine:
        assert engine.limits.max_context == engine.max_length == 96
        assert engine.limits.num_blocks * 16 == 16 * 1024
        assert engine.end_ids == {7}
    loaded = load(tiny, context_length=40, kv_tokens=50, max_sequences=3, max_step_tokens=2, seed=4)
    with closing(loaded.engine) as engine:
        assert (engine.max_length, engine.limits.num_blocks) == (40, 4)
        assert loaded.engine_config.max_step_tokens == 3, "room for one token of every sequence"
        assert (loaded.name, loaded.tokenizer, loaded.chat_template) == ("tiny-model", None, None)
        assert loaded.model_config == TINY or loaded.model_config.hidden_size == 32


def test_the_cache_is_sized_by_memory(tiny: Path) -> None:
    # 1 layer, 1 head, keys and values of 16 float16: 64 bytes per token, 1024 per block
    loaded = load(tiny, kv_bytes=10 * 1024 + 1023)
    with closing(loaded.engine) as engine:
        assert engine.limits.num_blocks == 10 and loaded.engine_config.kv_tokens is None
        assert loaded.describe()["kv_tokens"] == 160 and loaded.describe()["kv_mib_when_full"] == 0.0
    with pytest.raises(ConfigError, match=r"1000.*1024 bytes in f16"):
        load(tiny, kv_bytes=1000)
    with pytest.raises(ConfigError, match="both"):
        load(tiny, kv_bytes=10_000, kv_tokens=100)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_bytes_per_token_are_the_backends(tiny: Path, kv_format: str) -> None:
    """The budget is planned before the backend exists; both count the same."""
    pytest.importorskip("hayai._native")
    loaded = load_model(EngineConfig(model=str(tiny), kv_tokens=160, kv_format=kv_format))
    with closing(loaded.engine) as engine:
        said = engine.runner.describe()["kv_bytes_per_token"]
        assert said == kv_bytes_per_token(engine.groups.values(), kv_format)
        assert loaded.describe()["kv_format"] == kv_format


def test_describe_says_what_was_resolved(tiny: Path) -> None:
    loaded = load(tiny, kv_tokens=1600)
    with closing(loaded.engine):
        said = loaded.describe()
    assert said["context_length"] == said["model_context_length"] == 96
    assert (said["kv_tokens"], said["max_sequences"], said["vocab_size"]) == (1600, 16, 64)
    # 1 layer, 1 head, keys and values of 16 float16
    assert said["kv_mib_when_full"] == round(1600 * 2 * 16 * 2 / 2**20, 1)
    assert (said["kv_format"], said["prefix_cache"], said["mixed_step"]) == ("f16", "on", "2.5 decode steps")
    assert said["tokenizer"] == said["chat_template"] == "none"
    assert said["backend.backend"] == "reference" and str(said["weights"]).startswith("f32")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "gpu"}, ["'gpu'", "cpu", "reference"]),
        ({"context_length": 97}, ["97", "96"]),
        ({"context_length": 0}, ["context_length", "0"]),
        ({"threads": -1}, ["threads", "-1"]),
        ({"max_sequences": 0}, ["max_sequences"]),
        ({"kv_tokens": 1 << 27}, ["kv_tokens", str(1 << 26)]),
        ({"kv_format": "q4"}, ["kv_format", "f16", "q8", "'q4'"]),
        ({"step_ms": 0.0}, ["step_ms", "0.0"]),
    ],
)
def test_options_that_dont_fit(tiny: Path, options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as info:
        load_model(EngineConfig(**({"model": str(tiny), "backend": "reference"} | options)))  # type: ignore[arg-type]
    assert all(word in str(info.value) for word in words), str(info.value)


def test_a_broken_vocabulary_is_reported(tmp_path: Path) -> None:
    """It is read on another thread; its error comes out all the same."""
    metadata = llama_metadata(TINY) | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "a"],
        "tokenizer.ggml.merges": ["a a"],
    }
    path = write_gguf(tmp_path / "broken.gguf", metadata, random_llama(TINY))
    with pytest.raises(ModelError, match="twice"):
        load(path)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model file"):
        load(tmp_path / "nothing.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ModelError):
        load(tmp_path / "text.gguf")
    path = write_gguf(tmp_path / "other.gguf", {"general.architecture": "mamba"}, {})
    with pytest.raises(ModelError, match=r"mamba.*llama"):
        load(path)


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import hayai", ("numpy", "hayai.api")),
        ("import hayai.frontend", ("asyncio", "torch", "jinja2", "tokenizers", "fastapi", "hayai._native")),
    ],
)
def test_imports_stay_lazy(statement: str, forbidden: tuple[str, ...]) -> None:
    code = f"import sys; {statement}; print(*[m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
