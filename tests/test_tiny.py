"""Does anything work at all: a tiny random model from a file to tokens, on both backends, in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from hayai import LLM, Completion
from hayai.weights.gguf_writer import llama_metadata, random_llama, write_gguf
from tiny_models import LLAMA

PROMPTS = ([1, 5, 9, 2, 60, 31, 7], [3], [8] * 40)


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    return write_gguf(path, llama_metadata(LLAMA), random_llama(LLAMA, "f32", seed=3))


def complete(path: Path, backend: str) -> list[Completion]:
    with LLM(str(path), backend=backend, threads=2, max_sequences=2) as llm:
        return llm.generate(PROMPTS, max_tokens=12, temperature=0, ignore_eos=True, logprobs=0)


def test_both_backends_say_the_same(tiny_file: Path) -> None:
    fast, slow = complete(tiny_file, "cpu"), complete(tiny_file, "reference")
    for prompt, ours, truth in zip(PROMPTS, fast, slow, strict=True):
        assert len(ours.token_ids) == 12
        assert ours.token_ids == truth.token_ids
        assert len(set(ours.token_ids)) > 1, "a model of random weights doesn't repeat one token"
        assert ours.usage.prompt_tokens == len(prompt)
        for got, want in zip(ours.logprobs, truth.logprobs, strict=True):
            assert got.logprob == pytest.approx(want.logprob, abs=2e-3)


def test_one_prompt_alone_says_what_it_says_in_a_batch(tiny_file: Path) -> None:
    batch = complete(tiny_file, "cpu")
    with LLM(str(tiny_file), threads=1) as llm:
        alone = llm.generate(PROMPTS[0], max_tokens=12, temperature=0, ignore_eos=True, logprobs=0)
    assert alone.token_ids == batch[0].token_ids
    assert [entry.logprob for entry in alone.logprobs] == [entry.logprob for entry in batch[0].logprobs]
