"""Logit rows of one step that ask for different things: log-probabilities of named tokens beside choices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cpu_models import ISAS, WIDE, compile_cpu, plan_of, tokens_for
from hayai.backends.base import SamplingRow
from hayai.backends.sampling_reference import sample_row
from tiny_models import Sequences, compile_reference, llama_tensors

LOGPROBS = SamplingRow(num_logprobs=0)
# What the sum of exponentials, summed in another order, and one rounding of the result leave.
LOGPROB_TOLERANCE = 2e-5


def next_tokens(ids: list[int]) -> np.ndarray:
    """Per row the token that follows it; the last row has no target."""
    return np.array([*ids[1:], -1], np.int32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", ["f16", "q8_0", "q4_1"])
@pytest.mark.parametrize("vocab", [WIDE.vocab_size, 33, 1999])
def test_log_probabilities_of_named_tokens(vocab: int, format: str, isa: str) -> None:
    config = replace(WIDE, vocab_size=vocab)
    plan, ids = plan_of(config), tokens_for(config, 75)
    targets = next_tokens(ids)
    runner = compile_cpu(config, format, isa=isa)
    rows = [replace(LOGPROBS, num_logprobs=n % 4) for n in range(len(ids))]
    out = Sequences(runner, plan).step({0: ids}, sampling=rows, targets=targets)
    assert out.logits is not None
    for r, target in enumerate(targets.tolist()):
        want = sample_row(out.logits[r], rows[r], r, target=target)
        assert out.tokens[r] == want.token
        assert out.logprobs[r] == pytest.approx(want.logprob, abs=LOGPROB_TOLERANCE)
        assert out.top_ids[r].tolist() == want.top_ids.tolist()
        np.testing.assert_allclose(out.top_logprobs[r], want.top_logprobs, atol=LOGPROB_TOLERANCE)


@pytest.mark.parametrize("isa", ISAS)
def test_targets_have_the_bits_of_chosen_tokens_in_any_chunk(isa: str) -> None:
    """A target that is the choice has the choice's bits; one row at a time gives what all rows give."""
    plan, ids = plan_of(WIDE), tokens_for(WIDE, 71)
    runner = compile_cpu(WIDE, "q8_0", isa=isa)
    chosen = Sequences(runner, plan).step({0: ids}, sampling=[LOGPROBS] * len(ids), want_logits=False)
    named = Sequences(runner, plan).step(
        {0: ids}, sampling=[SamplingRow()] * len(ids), targets=chosen.tokens.copy(), want_logits=False
    )
    assert named.logprobs.tobytes() == chosen.logprobs.tobytes()
    for chunk in (1, 2, 5, 17, 40):
        cut = Sequences(runner, plan, seed=chunk)
        found = [
            cut.step(
                {0: part}, sampling=[SamplingRow()] * len(part),
                targets=chosen.tokens[at : at + len(part)].copy(), want_logits=False,
            ).logprobs
            for at in range(0, len(ids), chunk)
            for part in [ids[at : at + chunk]]
        ]  # fmt: skip
        assert np.concatenate(found).tobytes() == chosen.logprobs.tobytes(), f"chunks of {chunk}"


@pytest.mark.parametrize("isa", ISAS)
def test_targets_beside_ordinary_rows_change_no_bit(isa: str) -> None:
    plan = plan_of(WIDE)
    prompts = {i: tokens_for(WIDE, 3 + i, seed=i) for i in range(9)}
    rows = [
        SamplingRow(),
        SamplingRow(),
        replace(LOGPROBS, num_logprobs=3),
        SamplingRow(temperature=1.0, seed=5),
        SamplingRow(temperature=0.8, top_p=0.7, seed=6, num_logprobs=0),
        SamplingRow(),
        replace(LOGPROBS, num_logprobs=5),
        LOGPROBS,
        SamplingRow(),
    ]
    targets = np.array([-1, 7, -1, -1, -1, 300, 5, -1, -1], np.int32)
    runner = compile_cpu(WIDE, "q8_0", isa=isa)
    out = Sequences(runner, plan).step(
        prompts, rows="last", sampling=rows, targets=targets, want_logits=False
    )
    for i, ids in prompts.items():
        alone = Sequences(runner, plan, seed=i).step(
            {0: ids}, rows="last", sampling=[rows[i]], targets=targets[i : i + 1].copy(), want_logits=False
        )
        assert out.logprobs[i].tobytes() == alone.logprobs[0].tobytes()
        if alone.top_ids:
            assert out.top_ids[i].tolist() == alone.top_ids[0].tolist()
            assert out.top_logprobs[i].tobytes() == alone.top_logprobs[0].tobytes()
        if targets[i] < 0:
            assert out.tokens[i] == alone.tokens[0]
        asked = targets[i] >= 0 or rows[i].num_logprobs >= 0
        assert np.isnan(out.logprobs[i]) == (not asked)


def test_the_reference_gives_the_same_log_probabilities() -> None:
    """Through both backends, weights and head included; float weights, so that only rounding differs."""
    plan, ids = plan_of(WIDE), tokens_for(WIDE, 40)
    targets = next_tokens(ids)
    rows = [replace(LOGPROBS, num_logprobs=2)] * len(ids)
    reference = compile_reference({"main": plan}, llama_tensors(WIDE), "f32", kv_dtype="f16")
    want = Sequences(reference, plan).step({0: ids}, sampling=rows, targets=targets)
    out = Sequences(compile_cpu(WIDE, "f32"), plan).step({0: ids}, sampling=rows, targets=targets)
    np.testing.assert_allclose(out.logprobs, want.logprobs, atol=1e-3)
    assert [a.tolist() for a in out.top_ids] == [a.tolist() for a in want.top_ids]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_targets_beyond_the_vocabulary_are_refused(backend: str) -> None:
    plan = plan_of(WIDE)
    runner = (
        compile_cpu(WIDE, "q4_1")
        if backend == "cpu"
        else compile_reference({"main": plan}, llama_tensors(WIDE))
    )
    for targets in (np.array([WIDE.vocab_size], np.int32), np.array([1, 2], np.int32)):
        with pytest.raises(ValueError, match="target"):
            Sequences(runner, plan).step({0: [1, 2]}, rows="last", targets=targets)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("isa", ISAS)
def test_any_number_of_rows_gives_what_one_row_gives(isa: str, threads: int) -> None:
    """Rows go through the head in tiles of 16: greedy ones, others, and both beside each other."""
    config = replace(WIDE, vocab_size=2003)
    plan, ids = plan_of(config), tokens_for(config, 100)
    runner = compile_cpu(config, "q8_0", threads, isa)
    assert runner.describe()["head"] == "screened (exact)"
    logits = Sequences(runner, plan).logits({0: ids})
    for count in (1, 2, 3, 15, 16, 17, 21, 32, 33, 50, 100):
        for kinds in ("greedy", "targets", "both"):
            rows = [
                LOGPROBS if kinds == "targets" or (kinds == "both" and r % 3) else SamplingRow()
                for r in range(count)
            ]
            picks = np.arange(len(ids) - count, len(ids), dtype=np.int32)
            out = Sequences(runner, plan, seed=count).step(
                {0: ids}, logit_rows=picks, sampling=rows, want_logits=False
            )
            assert out.tokens.tolist() == logits[picks].argmax(axis=1).tolist(), f"{count} rows, {kinds}"
            for r, row in enumerate(rows):
                if row is LOGPROBS:
                    want = sample_row(logits[picks[r]], row, 0)
                    assert out.logprobs[r] == pytest.approx(want.logprob, abs=LOGPROB_TOLERANCE)
