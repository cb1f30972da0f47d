"""Prompts: exact length, never twice, ordinary tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from hayai.bench.prompts import PromptSource
from hayai.text.tokenizer import Tokenizer
from hayai.weights.gguf import GgufFile


@pytest.fixture(scope="module")
def tokenizer(default_model: Path) -> Tokenizer:
    with GgufFile(default_model) as file:
        found = Tokenizer.from_metadata(file.metadata)
    assert found is not None
    return found


def test_prompts_have_exact_lengths_and_differ_from_the_start(tokenizer: Tokenizer) -> None:
    source = PromptSource(3, tokenizer.vocab_size, lambda text: tokenizer.encode(text, special=False))
    starts = set()
    for n in (32, 512, 700) * 30:
        ids = source.ids(n)
        assert len(ids) == n
        assert not set(ids) & tokenizer.special_ids
        starts.add(tuple(ids[: PromptSource.DISTINCT]))
    assert len(starts) == 90


def test_a_seed_gives_the_same_prompts_and_another_seed_others() -> None:
    one, same, other = (PromptSource(seed, 1000) for seed in (1, 1, 2))
    first = one.ids(64)
    assert first == same.ids(64)
    assert first != other.ids(64)
    assert all(0 <= token < 1000 for token in first)


def test_prompts_run_out_loudly() -> None:
    source = PromptSource(0, 16, encode=lambda text: [7])
    source.ids(4)
    with pytest.raises(ValueError, match="no new prompt"):
        source.ids(4)
    with pytest.raises(ValueError, match="at least one token"):
        source.ids(0)
