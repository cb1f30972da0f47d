"""The CPU backend against the reference, and the determinism contract to the bit.

Tolerances (logits here are of order 1): both sides round activations to int8 per 32 for integer formats and
keys to fp16, but sum in other orders, and what lies on a rounding border may fall to either side. With float
weights that is 2^-11 of a key. With integer weights it is 1/127 of a block's largest input, which attention
and further layers spread: there the first row, which has seen one layer of it at most, is compared closely,
and the rest by root mean square. A wiring error shows as a difference of order 1 in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from cpu_models import ISAS, WIDE, compile_cpu, plan_of, tokens_for
from hayai.backends.base import SamplingRow, StepOutput, TokenHistory
from hayai.backends.cpu import CpuBackend
from hayai.backends.sampling_reference import sample_row, uniform
from hayai.config import RopeConfig
from hayai.errors import ConfigError, PlanError
from hayai.models.registry import build_plans
from hayai.plan import ops
from hayai.weights.loader import FileWeights
from tiny_models import GLM, LIMITS, LLAMA, MemoryFile, Sequences, compile_reference, llama_tensors

FORMATS = ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"]
FLOAT_TOLERANCE = 1e-3
INTEGER_RMS = 0.02

CONFIGS = {
    "half rope, untied": LLAMA,
    "interleaved, tied": WIDE,
    "one kv head, biases": replace(WIDE, num_kv_heads=1, attention_bias=True, tied_head=False),
    "as many kv heads, partial rope": replace(
        WIDE, num_kv_heads=6, rope=RopeConfig(theta=500.0, rotary_dim=16, interleaved=False)
    ),
    "odd head dim": replace(
        WIDE, head_dim=48, num_heads=2, rope=RopeConfig(theta=1e4, rotary_dim=48, interleaved=True)
    ),
    "llama3 rope factors": replace(
        WIDE, rope=RopeConfig(theta=1e4, rotary_dim=32, interleaved=False, scaling_kind="factors")
    ),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_reference(name: str, format: str, isa: str) -> None:
    config = CONFIGS[name]
    if format.startswith("q") and any(
        n % 32 for n in (config.hidden_size, config.num_heads * config.head_dim)
    ):
        pytest.fail("the configurations above must fit blocks of 32")
    plans = {"main": plan_of(config)}
    reference = compile_reference(
        plans, llama_tensors(config), format, kv_dtype="f16", quantize_activations=True
    )
    ids = tokens_for(config, 90)
    expected = Sequences(reference, plans["main"]).logits({0: ids})
    cpu = Sequences(compile_cpu(config, format, isa=isa), plans["main"], seed=3)
    found = np.concatenate(
        [cpu.logits({0: ids[:77]}), cpu.logits({0: ids[77:78]}), cpu.logits({0: ids[78:]})]
    )
    assert found.shape == expected.shape
    difference = np.abs(found - expected)
    assert difference[0].max() < FLOAT_TOLERANCE
    if format.startswith("q"):
        assert np.sqrt(np.mean(difference**2)) < INTEGER_RMS
    else:
        assert difference.max() < FLOAT_TOLERANCE


def last_logits(sequences: Sequences, ids: Sequence[int], chunk: int) -> np.ndarray:
    """Logits of every row, the tokens fed `chunk` at a time."""
    return np.concatenate([sequences.logits({0: ids[at : at + chunk]}) for at in range(0, len(ids), chunk)])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", ["f16", "q8_0", "q4_0", "q4_1"])
def test_bits_do_not_depend_on_threads_or_chunks(format: str, isa: str) -> None:
    plan, ids = plan_of(WIDE), tokens_for(WIDE, 100)
    expected = last_logits(Sequences(compile_cpu(WIDE, format, 1, isa), plan), ids, 100)
    for threads in (1, 2, 3):
        runner = compile_cpu(WIDE, format, threads, isa)
        for chunk in (1, 2, 3, 5, 16, 33, 64):
            found = last_logits(Sequences(runner, plan, seed=chunk), ids, chunk)
            assert found.tobytes() == expected.tobytes(), f"{threads} threads, chunks of {chunk}"


@pytest.mark.parametrize("isa", ISAS)
def test_bits_do_not_depend_on_the_batch(isa: str) -> None:
    plan = plan_of(WIDE)
    prompts = {i: tokens_for(WIDE, length, seed=i) for i, length in enumerate((40, 3, 17, 66, 1))}
    runner = compile_cpu(WIDE, "q4_1", isa=isa)
    together = Sequences(runner, plan, seed=1)
    first = together.logits({i: ids[: len(ids) // 2 + 1] for i, ids in prompts.items()})
    rest = {i: ids[len(ids) // 2 + 1 :] for i, ids in prompts.items() if len(ids) // 2 + 1 < len(ids)}
    second = together.logits(rest)
    at = [0, 0]
    for ids in prompts.values():
        cut = len(ids) // 2 + 1
        alone = Sequences(runner, plan, seed=9).logits({0: ids})
        assert alone[:cut].tobytes() == first[at[0] : at[0] + cut].tobytes()
        assert alone[cut:].tobytes() == second[at[1] : at[1] + len(ids) - cut].tobytes()
        at = [at[0] + cut, at[1] + len(ids) - cut]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", range(4))
def test_the_screened_head_chooses_what_all_logits_choose(isa: str, seed: int) -> None:
    config = replace(WIDE, vocab_size=2000 + seed)
    plan = plan_of(config)
    runner = compile_cpu(config, "q8_0", isa=isa, seed=seed)
    assert runner.describe()["head"] == "screened (exact)"
    for batch in (1, 2, 7):
        prompts = {i: tokens_for(config, 5 + i, seed=seed + i) for i in range(batch)}
        full = Sequences(runner, plan).step(prompts, rows="last")
        screened = Sequences(runner, plan).step(prompts, rows="last", want_logits=False)
        assert full.logits is not None
        assert screened.tokens.tolist() == full.logits.argmax(axis=1).tolist() == full.tokens.tolist()


def test_the_screened_head_takes_the_lowest_id_of_equal_rows() -> None:
    config = replace(WIDE, vocab_size=640)
    arrays = llama_tensors(config)
    table = arrays["model.embed_tokens.weight"]
    arrays["model.embed_tokens.weight"] = np.tile(table[:64], (10, 1))
    plan = plan_of(config)
    runner = CpuBackend(2).compile(
        {"main": plan}, FileWeights(MemoryFile(arrays, "q8_0"), "hf", plan.slots), LIMITS
    )
    out = Sequences(runner, plan).step({0: [3, 5, 9]}, rows="last", want_logits=False)
    assert out.tokens[0] < 64


SAMPLING = [
    SamplingRow(temperature=1.0, seed=3),
    SamplingRow(temperature=0.7, top_p=0.8, seed=4),
    SamplingRow(temperature=1.5, top_k=7, seed=5),
    SamplingRow(temperature=1.2, top_k=40, top_p=0.5, seed=6),
    SamplingRow(temperature=2.0, min_p=0.2, seed=7, num_logprobs=3),
    SamplingRow(temperature=1.0, min_p=0.05, top_k=5, top_p=0.9, seed=8),
    SamplingRow(repetition_penalty=1.7, presence_penalty=0.6, frequency_penalty=0.4, num_logprobs=0),
    SamplingRow(bias=((5, 50.0), (6, -3.0)), num_logprobs=5),
    SamplingRow(temperature=0.01, seed=9),
    SamplingRow(num_logprobs=2),
]


@pytest.mark.parametrize("row", SAMPLING, ids=str)
def test_sampling_equals_the_reference(row: SamplingRow) -> None:
    plan, runner = plan_of(WIDE), compile_cpu(WIDE, "q4_1")
    history = TokenHistory(np.array([4, 5, 77, 300], np.int32), np.array([0, 3, 1, 2], np.int32))
    penalised = row.repetition_penalty != 1.0
    for trial in range(25):
        ids = tokens_for(WIDE, 1 + trial, seed=trial)
        out = Sequences(runner, plan).step(
            {0: ids}, rows="last", sampling=[row], histories=(history if penalised else None,)
        )
        assert out.logits is not None
        expected = sample_row(out.logits[0], row, len(ids) - 1, history if penalised else None)
        assert out.tokens[0] == expected.token
        if row.num_logprobs >= 0:
            assert out.logprobs[0] == pytest.approx(expected.logprob, abs=1e-4)
            assert out.top_ids == () or out.top_ids[0].tolist() == expected.top_ids.tolist()
            if row.num_logprobs:
                np.testing.assert_allclose(out.top_logprobs[0], expected.top_logprobs, atol=1e-4)
        else:
            assert np.isnan(out.logprobs[0])


def test_a_mask_leaves_only_what_it_allows() -> None:
    plan, runner = plan_of(WIDE), compile_cpu(WIDE, "q8_0")
    mask = np.zeros((WIDE.vocab_size + 31) // 32, np.uint32)
    mask[3] = 1 << 5
    for row in (SamplingRow(), SamplingRow(temperature=1.0, seed=1)):
        out: StepOutput = Sequences(runner, plan).step(
            {0: [1, 2]}, rows="last", sampling=[row], masks=(mask,), want_logits=False
        )
        assert out.tokens.tolist() == [3 * 32 + 5]


def test_draws_follow_the_distribution() -> None:
    """2000 draws over seeds: frequencies within 5 standard errors of the probabilities."""
    plan, runner = plan_of(WIDE), compile_cpu(WIDE, "q4_1")
    sequences = Sequences(runner, plan)
    logits = sequences.logits({0: [8, 9, 10]})[-1].astype(np.float64)
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    counts = np.zeros(WIDE.vocab_size)
    for seed in range(2000):
        row = SamplingRow(temperature=1.0, seed=seed)
        out = sequences.step(
            {0: [10]}, rows="last", sampling=[row], at={0: 2}, advance=False, want_logits=False
        )
        counts[out.tokens[0]] += 1
    error = np.sqrt(probabilities * (1 - probabilities) * 2000) + 1
    assert (np.abs(counts - 2000 * probabilities) < 5 * error).all()
    assert uniform(1, 2) != uniform(2, 1)


def test_hostile_steps_are_refused() -> None:
    plan, runner = plan_of(WIDE), compile_cpu(WIDE, "q4_1")
    with pytest.raises(ValueError, match="token id beyond the vocabulary"):
        Sequences(runner, plan).step({0: [WIDE.vocab_size]})
    with pytest.raises(ValueError, match="more tokens or rows"):
        Sequences(runner, plan).step({0: [1] * (LIMITS.max_tokens + 1)})
    sequences = Sequences(runner, plan)
    sequences.tables["kv", 0] = [LIMITS.num_blocks]
    with pytest.raises(ValueError, match="block number out of range"):
        sequences.step({0: [1]})
    beyond = np.array([LIMITS.max_context], np.int32)
    with pytest.raises(ValueError, match="position beyond the context"):
        Sequences(runner, plan).step({0: [1]}, positions=beyond)
    with pytest.raises(ValueError, match="query_start must span"):
        Sequences(runner, plan).step({0: [1]}, query_start=np.array([0, 2], np.int32))
    with pytest.raises(ValueError, match="logit row out of range"):
        Sequences(runner, plan).step({0: [1]}, logit_rows=np.array([7], np.int32))


def test_an_op_that_is_missing_fails_at_load_by_name() -> None:
    plans = build_plans(GLM, "hf")
    with pytest.raises(PlanError, match="the cpu backend lacks"):
        CpuBackend(1).compile({"main": plans["main"]}, FileWeights(MemoryFile({}), "hf"), LIMITS)
    with pytest.raises(ConfigError, match="instruction set"):
        CpuBackend(1, isa="sse9").compile({"main": plan_of(LLAMA)}, FileWeights(MemoryFile({}), "hf"), LIMITS)


def test_other_formats_are_expanded_and_said(caplog: pytest.LogCaptureFixture) -> None:
    config = replace(WIDE, tied_head=False)
    runner = compile_cpu(config, "q5_0")
    assert "q5_0" in str(runner.describe()["expanded"])
    assert "expanded to f32" in caplog.text
    plans = {"main": plan_of(config)}
    reference = compile_reference(plans, llama_tensors(config), "q5_0", kv_dtype="f16")
    ids = tokens_for(config, 20)
    found = Sequences(runner, plans["main"]).logits({0: ids})
    assert np.abs(found - Sequences(reference, plans["main"]).logits({0: ids})).max() < FLOAT_TOLERANCE


@pytest.mark.parametrize("format", ["f32", "q8_0"])
def test_ops_outside_every_pattern_run_one_by_one(format: str) -> None:
    """The same plan with a copy behind every op that would be fused gives the same logits."""
    plan = plan_of(WIDE)
    split: list[ops.Op] = []
    buffers = dict(plan.buffers)
    for op in plan.ops:
        split.append(op)
        if (
            isinstance(op, ops.RmsNorm | ops.Linear | ops.Attention | ops.Glu)
            and op.names("writes")[0] in buffers
        ):
            for name in op.names("writes"):
                if buffers[name].shape[0] == "T":
                    copy = replace(buffers[name], name=f"{name}_copy")
                    buffers[copy.name] = copy
                    split += [ops.Copy(name, copy.name), ops.Copy(copy.name, name)]
    unfused = replace(plan, ops=tuple(split), buffers=buffers)
    weights = FileWeights(MemoryFile(llama_tensors(WIDE), format), "hf", plan.slots)
    ids = tokens_for(WIDE, 50)
    for threads in (1, 2):
        fused = Sequences(CpuBackend(threads).compile({"main": plan}, weights, LIMITS), plan)
        apart = Sequences(CpuBackend(threads).compile({"main": unfused}, weights, LIMITS), unfused)
        for chunk in (ids[:30], ids[30:31], ids[31:]):
            assert fused.logits({0: chunk}).tobytes() == apart.logits({0: chunk}).tobytes()
