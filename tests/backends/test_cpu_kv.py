"""The formats of the KV cache on the CPU backend: against the reference, and the contract to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from cpu_models import ISAS, WIDE, plan_of, tokens_for
from hayai.backends.base import KV_FORMATS, Limits, SamplingRow, kv_bytes_per_token
from hayai.backends.cpu import CpuBackend, CpuRunner
from hayai.backends.reference import ReferenceBackend, ReferenceRunner
from hayai.backends.reference_cache import encode_q8
from hayai.config import ModelConfig, RopeConfig
from hayai.errors import PlanError
from hayai.weights.loader import FileWeights
from tiny_models import LIMITS, MemoryFile, Sequences, llama_tensors

CONFIGS = {
    "interleaved": WIDE,
    "half rope": replace(WIDE, rope=RopeConfig(theta=1e4, rotary_dim=32, interleaved=False)),
    "odd head dim": replace(
        WIDE, head_dim=48, num_heads=2, rope=RopeConfig(theta=1e4, rotary_dim=48, interleaved=True)
    ),
    # no whole groups of rows to a head: the ops run one by one
    "tiny heads": replace(
        WIDE, head_dim=20, num_heads=6, hidden_size=120, rope=RopeConfig(theta=1e4, rotary_dim=20)
    ),
    "one kv head, biases": replace(WIDE, num_kv_heads=1, attention_bias=True, tied_head=False),
}


def limits_of(kv: str) -> Limits:
    return replace(LIMITS, kv_format=kv)


def compile_kv(
    config: ModelConfig,
    kv: str,
    format: str = "f32",
    threads: int = 2,
    isa: str | None = None,
    arrays: Mapping[str, np.ndarray] | None = None,
) -> CpuRunner:
    plan = plan_of(config)
    file = MemoryFile(llama_tensors(config) if arrays is None else arrays, format)
    return CpuBackend(threads, isa).compile(
        {"main": plan}, FileWeights(file, "hf", plan.slots), limits_of(kv)
    )


def compile_twin(config: ModelConfig, kv: str) -> ReferenceRunner:
    weights = FileWeights(MemoryFile(llama_tensors(config)), "hf")
    return ReferenceBackend().compile({"main": plan_of(config)}, weights, limits_of(kv))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CONFIGS)
def test_q8_equals_the_reference(name: str, isa: str) -> None:
    """Float weights: both sides differ by rounding, and where a key lies on the border of two codes, by one
    code of it. The cache's own loss, which is left out here, is ten times that."""
    config = CONFIGS[name]
    plan, ids = plan_of(config), tokens_for(config, 90)
    want = Sequences(compile_twin(config, "q8"), plan).logits({0: ids})
    cpu = Sequences(compile_kv(config, "q8", isa=isa), plan, seed=3)
    found = np.concatenate([cpu.logits({0: part}) for part in (ids[:77], ids[77:78], ids[78:])])
    f16 = Sequences(compile_twin(config, "f16"), plan).logits({0: ids})

    def rms(x: np.ndarray) -> float:
        return float(np.sqrt(np.mean(x**2)))

    assert rms(found - want) < 0.2 * rms(want - f16)
    assert np.abs(found - want).max() < 0.02


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv", KV_FORMATS)
def test_bits_do_not_depend_on_threads_or_chunks(kv: str, isa: str) -> None:
    plan, ids = plan_of(WIDE), tokens_for(WIDE, 100)
    expected = Sequences(compile_kv(WIDE, kv, "q4_1", 1, isa), plan).logits({0: ids})
    for threads in (1, 2, 3):
        runner = compile_kv(WIDE, kv, "q4_1", threads, isa)
        for chunk in (1, 2, 3, 5, 16, 33, 64):
            sequences = Sequences(runner, plan, seed=chunk)
            parts = [sequences.logits({0: ids[at : at + chunk]}) for at in range(0, len(ids), chunk)]
            assert np.concatenate(parts).tobytes() == expected.tobytes(), f"{threads} threads, {chunk}"


@pytest.mark.parametrize("kv", KV_FORMATS)
def test_bits_do_not_depend_on_the_batch(kv: str) -> None:
    plan, runner = plan_of(WIDE), compile_kv(WIDE, kv, "q4_1")
    prompts = {i: tokens_for(WIDE, length, seed=i) for i, length in enumerate((40, 3, 17, 34, 1))}
    together = Sequences(runner, plan, seed=1).logits(prompts)
    at = 0
    for ids in prompts.values():
        alone = Sequences(runner, plan, seed=9).logits({0: ids})
        assert alone.tobytes() == together[at : at + len(ids)].tobytes()
        at += len(ids)


@pytest.mark.parametrize("kv", KV_FORMATS)
def test_copied_blocks_read_the_same(kv: str) -> None:
    plan, ids = plan_of(WIDE), tokens_for(WIDE, 60)
    for runner in (compile_kv(WIDE, kv), compile_twin(WIDE, kv)):
        original = Sequences(runner, plan)
        original.step({0: ids[:50]}, want_logits=False)
        copy = Sequences(runner, plan, lengths={0: 50})
        blocks = original.tables["kv", 0]
        fresh = [block for block in range(LIMITS.num_blocks) if block not in blocks][: len(blocks)]
        runner.copy_blocks("kv", np.array(blocks, np.int32), np.array(fresh, np.int32))
        copy.tables["kv", 0] = list(fresh)
        copy.free["kv"] = [b for b in copy.free["kv"] if b not in (*blocks, *fresh)]
        want = original.logits({0: ids[50:]})
        assert copy.logits({0: ids[50:]}).tobytes() == want.tobytes()


@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_values_beyond_the_format_leave_the_contract_whole(kv: str, isa: str) -> None:
    """Values of about 1e6, beyond fp16, at every position: chunked, or one by one, the same finite bits."""
    config = replace(WIDE, num_layers=2)
    arrays = dict(llama_tensors(config))
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.v_proj.weight"
        arrays[name] = arrays[name] * np.float32(1e6)
    plan, ids = plan_of(config), tokens_for(config, 40)
    runner = compile_kv(config, kv, isa=isa, arrays=arrays)
    want = Sequences(runner, plan).logits({0: ids})
    assert np.isfinite(want).all()
    for chunk in (1, 3, 16):
        sequences = Sequences(runner, plan, seed=chunk)
        parts = [sequences.logits({0: ids[at : at + chunk]}) for at in range(0, len(ids), chunk)]
        assert np.concatenate(parts).tobytes() == want.tobytes()


def test_what_the_runner_says_of_its_cache() -> None:
    plan = plan_of(WIDE)
    heads = WIDE.num_layers * WIDE.num_kv_heads
    sizes = {"f16": heads * 2 * 2 * WIDE.head_dim, "q8": heads * 2 * (WIDE.head_dim + 2)}
    for kv in KV_FORMATS:
        said = compile_kv(WIDE, kv).describe()
        assert said["kv_format"] == kv
        assert said["kv_bytes_per_token"] == sizes[kv]
        assert kv_bytes_per_token(plan.groups.values(), kv) == sizes[kv]
        assert said["kv_memory_bytes"] == sizes[kv] * 16 * LIMITS.num_blocks
        assert compile_twin(WIDE, kv).describe()["kv_format"] == kv


def test_an_unknown_format_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match="f16, q8: 'q2'"):
        compile_kv(WIDE, "q2")
    with pytest.raises(PlanError, match="f16, q8: 'q2'"):
        compile_twin(WIDE, "q2")


def test_codes_and_scales() -> None:
    rows = np.array([[0, 0, 0], [127, -127, 63.5], [1e9, 1, np.nan], [1e-9, 0, -1e-9]], np.float32)
    codes, scales = encode_q8(rows)
    assert scales.tolist() == [0, 1, 65504, 0]
    assert codes.tolist() == [[0, 0, 0], [127, -127, 64], [127, 0, 127], [0, 0, 0]]


def test_greedy_tokens_of_a_q8_cache_do_not_depend_on_the_way() -> None:
    """Prompt at once and decode, or token by token, alone or beside another sequence."""
    plan, runner = plan_of(WIDE), compile_kv(WIDE, "q8", "q8_0")
    ids = tokens_for(WIDE, 30)

    def run(chunk: int, other: bool) -> list[int]:
        sequences, tokens = Sequences(runner, plan, seed=chunk), list(ids)
        for at in range(0, len(ids), chunk):
            out = sequences.step({0: ids[at : at + chunk]}, rows="last", want_logits=False)
        for _ in range(40):
            tokens.append(int(out.tokens[0]))
            beside = {1: tokens_for(WIDE, 3, seed=len(tokens))} if other else {}
            rows = [SamplingRow()] * (1 + len(beside))
            out = sequences.step({0: tokens[-1:], **beside}, rows="last", sampling=rows, want_logits=False)
        return tokens

    assert run(30, False) == run(1, False) == run(7, True)
