"""Rows under a mask: what a mask forbids is never chosen, and what stands beside it changes no bit.

Greedy rows of a Q8_0 head are screened with their mask, others have all their logits: both must agree.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cpu_models import ISAS, WIDE, compile_cpu, plan_of, tokens_for
from hayai.backends.base import SamplingRow, StepOutput
from hayai.backends.cpu import CpuBackend
from hayai.backends.sampling_reference import sample_row
from hayai.config import ModelConfig
from hayai.weights.loader import FileWeights
from tiny_models import LIMITS, MemoryFile, Sequences, compile_reference, llama_tensors

VOCAB = 2003
CONFIG = replace(WIDE, vocab_size=VOCAB)
ROWS = {
    "greedy": SamplingRow(),
    "greedy, logprobs": SamplingRow(num_logprobs=3),
    "sampled": SamplingRow(temperature=1.3, seed=4),
    "nucleus": SamplingRow(temperature=1.5, top_p=0.8, top_k=50, seed=9, num_logprobs=0),
    "min_p": SamplingRow(temperature=2.0, min_p=0.1, seed=11),
    "penalised": SamplingRow(bias=((7, 4.0), (8, -4.0)), num_logprobs=1),
}


def mask_of(ids: np.ndarray | list[int], vocab: int = VOCAB) -> np.ndarray:
    allowed = np.zeros(-(-vocab // 32) * 32, np.uint8)
    allowed[ids] = 1
    return np.packbits(allowed, bitorder="little").view(np.uint32)


def allowed_sets(vocab: int = VOCAB) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        "first": np.array([0]),
        "last": np.array([vocab - 1]),
        "one": np.array([77]),
        "few": rng.permutation(vocab)[:9],
        "half": rng.permutation(vocab)[: vocab // 2],
        "most": np.delete(np.arange(vocab), rng.permutation(vocab)[:40]),
        "all": np.arange(vocab),
        "a range": np.arange(130, 300),
    }


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", ["q8_0", "q4_1"])
@pytest.mark.parametrize("kind", ROWS)
def test_masked_rows_equal_the_reference(kind: str, format: str, isa: str) -> None:
    plan, runner, row = plan_of(CONFIG), compile_cpu(CONFIG, format, isa=isa), ROWS[kind]
    for name, ids in allowed_sets().items():
        prompt = tokens_for(CONFIG, 7, seed=len(ids))
        mask = mask_of(ids)
        logits = Sequences(runner, plan).logits({0: prompt}, rows="last")
        out = Sequences(runner, plan, seed=2).step(
            {0: prompt}, rows="last", sampling=[row], masks=(mask,), want_logits=False
        )
        want = sample_row(logits[0], row, len(prompt) - 1, mask=mask)
        assert out.tokens[0] == want.token, name
        assert out.tokens[0] in ids, name
        if row.num_logprobs >= 0:  # of the raw logits, mask or not
            assert out.logprobs[0] == pytest.approx(want.logprob, abs=2e-5)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("isa", ISAS)
def test_masked_rows_beside_others_change_no_bit(isa: str, threads: int) -> None:
    plan, runner = plan_of(CONFIG), compile_cpu(CONFIG, "q8_0", threads, isa)
    ids = tokens_for(CONFIG, 60)
    masks = [None, *map(mask_of, allowed_sets().values())]
    kinds = list(ROWS.values())
    rows = [kinds[r % 4] for r in range(len(ids))]
    chosen = tuple(masks[r % len(masks)] for r in range(len(ids)))
    out = Sequences(runner, plan).step({0: ids}, sampling=rows, masks=chosen, want_logits=False)
    sequences = Sequences(runner, plan, seed=3)
    for r, token in enumerate(ids):
        alone: StepOutput = sequences.step(
            {0: [token]}, sampling=[rows[r]], masks=(chosen[r],), want_logits=False
        )
        assert alone.tokens[0] == out.tokens[r]
        assert alone.logprobs[0].tobytes() == out.logprobs[r].tobytes()


def broken_head(config: ModelConfig, row: int) -> dict[str, np.ndarray]:
    arrays = llama_tensors(config)
    table = arrays["model.embed_tokens.weight"].copy()
    table[row] *= 1e5  # its logit overflows to infinity of either sign
    arrays["lm_head.weight"] = table
    return arrays


@pytest.mark.parametrize("format", ["q8_0", "f32"])
def test_the_choice_stays_allowed_where_numbers_overflow(format: str) -> None:
    """A huge norm weight makes every logit infinite or NaN: what is left to say is the lowest id allowed."""
    config = replace(CONFIG, tied_head=False)
    arrays = broken_head(config, 3)
    arrays["model.norm.weight"] = np.full_like(arrays["model.norm.weight"], 3e38)
    plan = plan_of(config)
    runner = CpuBackend(2).compile(
        {"main": plan}, FileWeights(MemoryFile(arrays, format), "hf", plan.slots), LIMITS
    )
    for name, ids in allowed_sets().items():
        for row in (ROWS["greedy"], ROWS["sampled"], ROWS["greedy, logprobs"]):
            out = Sequences(runner, plan).step(
                {0: [1, 2, 3]}, rows="last", sampling=[row], masks=(mask_of(ids),), want_logits=False
            )
            assert out.tokens[0] in ids, name


def test_the_reference_stays_within_a_mask_without_finite_logits() -> None:
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[::2] = np.nan
    for ids in allowed_sets().values():
        for row in (ROWS["greedy"], ROWS["sampled"]):
            assert sample_row(logits, row, 0, mask=mask_of(ids)).token == ids.min()


def test_a_mask_is_read_again_when_the_same_step_comes_again() -> None:
    """The engine changes a step's arrays in place and hands over the same object."""
    plan, runner = plan_of(CONFIG), compile_cpu(CONFIG, "q8_0")
    reference = compile_reference({"main": plan}, llama_tensors(CONFIG), "q8_0", kv_dtype="f16")
    for target in (runner, reference):
        seen = []
        sequences = Sequences(target, plan)
        kept: list[object] = []
        inner = target.step

        def keep(step: object, name: str, inner: object = inner, kept: list[object] = kept) -> object:
            kept.append(step)
            return inner(step, name)  # type: ignore[operator]

        sequences.runner = type("Kept", (), {"step": staticmethod(keep)})
        mask = mask_of([5])
        seen.append(sequences.step({0: [1]}, rows="last", masks=(mask,), want_logits=False).tokens[0])
        mask[:] = mask_of([6])
        seen.append(target.step(kept[0]).tokens[0])  # type: ignore[arg-type]
        assert [int(token) for token in seen] == [5, 6]
