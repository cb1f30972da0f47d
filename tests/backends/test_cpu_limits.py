"""The CPU backend at its limits: full caches, hostile arrays, numbers that overflow."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from cpu_models import ISAS, WIDE, compile_cpu, plan_of, tokens_for
from hayai.backends.base import Limits, SamplingRow
from hayai.backends.cpu import CpuBackend, CpuRunner
from hayai.errors import ConfigError
from hayai.weights.loader import FileWeights
from tiny_models import MemoryFile, Sequences, llama_tensors


@pytest.mark.parametrize("window", [0, 40])
def test_more_long_sequences_than_split_attention_has_room_for(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight threads and one kv head: 25 full contexts are still cut by splits, but not all of them fit."""
    limits = Limits(max_tokens=256, max_sequences=32, max_rows=32, num_blocks=500, max_context=256)
    monkeypatch.setattr("tiny_models.LIMITS", limits)
    config = replace(WIDE, num_kv_heads=1, num_layers=2)
    plan = plan_of(config)
    plan = replace(
        plan, ops=tuple(replace(op, window=window) if op.kind == "attention" else op for op in plan.ops)
    )
    weights = FileWeights(MemoryFile(llama_tensors(config), "q4_1"), "hf", plan.slots)
    runner = CpuBackend(8).compile({"main": plan}, weights, limits)
    prompts = {i: tokens_for(config, 230 + i, seed=i) for i in range(25)}
    together = Sequences(runner, plan)
    for i, ids in prompts.items():
        together.step({i: ids[:-1]}, rows="last", want_logits=False)
    found = together.logits({i: ids[-1:] for i, ids in prompts.items()})
    for i, ids in prompts.items():
        alone = Sequences(runner, plan, seed=i).logits({0: ids}, rows="last")
        assert found[i].tobytes() == alone[0].tobytes(), f"sequence {i}"


def native_step(runner: CpuRunner, **changes: Any) -> None:
    """One token of a fresh sequence with one greedy row, some arrays replaced."""
    ints = lambda *values: np.array(values, np.int32)  # noqa: E731
    arrays: dict[str, Any] = {
        "tokens": ints(1), "positions": ints(0), "query_start": ints(0, 1), "tables": [ints(0)[None]],
        "logit_rows": ints(0), "sampling": runner._spec(SamplingRow(repetition_penalty=1.5)),
        "out_tokens": ints(0), "out_logprobs": np.zeros(1, np.float32),
    }  # fmt: skip
    assert runner._executor is not None
    runner._executor.step(**{**arrays, **changes})


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


FLOATS = np.zeros(3, np.float32)
HOSTILE: dict[str, tuple[str, dict[str, Any]]] = {
    "mask of too few words": ("mask", {"masks": [np.zeros(2, np.uint32)]}),
    "masks for other rows": ("mask", {"masks": [None, None]}),
    "logits of another vocabulary": ("out_logits", {"out_logits": np.zeros((1, 7), np.float32)}),
    "logits of no row": ("out_logits", {"out_logits": np.zeros((0, WIDE.vocab_size), np.float32)}),
    "biases without values": ("bias", {"bias_start": int32(0, 3), "bias_ids": int32(1, 2, 3)}),
    "fewer biases than said": (
        "bias", {"bias_start": int32(0, 9), "bias_ids": int32(1, 2, 3), "bias_values": FLOATS}
    ),
    "biases of no row": ("bias", {"bias_start": int32(0), "bias_ids": int32(1), "bias_values": FLOATS[:1]}),
    "biases from before the start": (
        "bias", {"bias_start": int32(-9, 3), "bias_ids": int32(1, 2, 3), "bias_values": FLOATS}
    ),
    "fewer counts than ids": (
        "histor", {"history_start": int32(0, 2), "history_ids": int32(1, 2), "history_counts": int32(1)}
    ),
    "a history past the vocabulary": (
        "histor",
        {"history_start": int32(0, 1), "history_ids": int32(WIDE.vocab_size), "history_counts": int32(1)},
    ),
    "alternatives without values": ("top_", {"top_ids": np.zeros((1, 2), np.int32)}),
    "alternatives of no row": (
        "top_", {"top_ids": np.zeros((0, 2), np.int32), "top_logprobs": np.zeros((0, 2), np.float32)}
    ),
    "fewer alternatives than asked": (
        "top_",
        {
            "sampling": None, "top_ids": np.zeros((1, 2), np.int32),
            "top_logprobs": np.zeros((1, 2), np.float32),
        },
    ),
    "alternatives asked for and no place": ("top_", {"sampling": None}),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_arrays_that_would_be_overrun_are_refused(name: str) -> None:
    runner = compile_cpu(WIDE, "q4_1")
    message, changes = HOSTILE[name]
    if "sampling" in changes:
        changes = {**changes, "sampling": runner._spec(SamplingRow(num_logprobs=9))}
    with pytest.raises(ValueError, match=message):
        native_step(runner, **changes)
    native_step(runner)  # and the next step is served


def test_histories_may_not_run_backwards() -> None:
    runner = compile_cpu(WIDE, "q4_1")
    spec = np.concatenate([runner._spec(SamplingRow(repetition_penalty=1.5))] * 2)
    with pytest.raises(ValueError, match="histor"):
        native_step(
            runner, logit_rows=int32(0, 0), sampling=spec, out_tokens=int32(0, 0),
            out_logprobs=np.zeros(2, np.float32), history_start=int32(0, 9000, 1), history_ids=int32(1),
            history_counts=int32(1),
        )  # fmt: skip


def test_more_alternatives_than_tokens() -> None:
    plan, runner = plan_of(WIDE), compile_cpu(WIDE, "q4_1")
    row = SamplingRow(num_logprobs=WIDE.vocab_size + 5)
    out = Sequences(runner, plan).step({0: [1]}, rows="last", sampling=[row])
    assert sorted(out.top_ids[0].tolist()) == list(range(WIDE.vocab_size))
    assert np.isfinite(out.top_logprobs[0]).all() and len(out.top_logprobs[0]) == WIDE.vocab_size


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1e18, 1e25, 1e35])
def test_screening_of_activations_whose_norm_overflows(size: float, isa: str) -> None:
    config = replace(WIDE, vocab_size=1500)
    arrays = llama_tensors(config)
    arrays["model.norm.weight"] = arrays["model.norm.weight"] * np.float32(size)
    plan = plan_of(config)
    for threads in (1, 3):
        weights = FileWeights(MemoryFile(arrays, "q8_0"), "hf", plan.slots)
        runner = CpuBackend(threads, isa).compile({"main": plan}, weights, Limits(64, 4, 64, 96, 256))
        for seed in range(6):
            ids = {0: tokens_for(config, 6, seed=seed)}
            full = Sequences(runner, plan).step(ids, rows="last")
            screened = Sequences(runner, plan).step(ids, rows="last", want_logits=False)
            assert screened.tokens.tolist() == full.tokens.tolist()


FORKED = """
import os, warnings
import numpy as np
from cpu_models import WIDE, compile_cpu, plan_of
from tiny_models import Sequences

warnings.simplefilter("ignore")  # newer Pythons warn of any fork beside threads: that is the point here
plan, runner = plan_of(WIDE), compile_cpu(WIDE, "q4_1", 2)
Sequences(runner, plan).step({0: [1]})
if os.fork() == 0:
    try:
        Sequences(runner, plan).step({0: [1]})
    except RuntimeError as error:
        print(error, flush=True)
    runner.close()
    os._exit(0)
os.wait()
Sequences(runner, plan).step({0: [1]})
print("parent goes on")
"""


def test_a_forked_process_says_so_instead_of_hanging() -> None:
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "was forked after the model was loaded" in done.stdout
    assert "parent goes on" in done.stdout


@pytest.mark.parametrize("blocks", [1 << 40, 1 << 60])
def test_a_cache_beyond_all_memory_is_an_error_that_says_so(blocks: int) -> None:
    plan = plan_of(WIDE)
    weights = FileWeights(MemoryFile(llama_tensors(WIDE), "q4_1"), "hf", plan.slots)
    with pytest.raises(ConfigError, match=r"no memory for .* a cache of [0-9.]+ GB"):
        CpuBackend(1).compile({"main": plan}, weights, Limits(64, 4, 64, blocks, 256))


def test_two_steps_at_once_are_refused() -> None:
    """Threads that step one model together: a step is whole or it is refused."""
    plan, runner = plan_of(WIDE), compile_cpu(WIDE, "q4_1", 2)
    ids = {0: tokens_for(WIDE, 100)}
    expected = Sequences(runner, plan).logits(ids).tobytes()
    refused: list[str] = []

    def work(seed: int) -> None:
        for _ in range(30):
            try:
                Sequences(runner, plan, seed=seed).logits(ids)
            except RuntimeError as error:
                refused.append(str(error))

    threads = [Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused and all("another step" in text for text in refused)
    assert Sequences(runner, plan).logits(ids).tobytes() == expected


def test_threads_that_cannot_be_started_are_an_error() -> None:
    """Stacks that the address space has no room for: an exception, and no thread is left behind."""
    script = (
        "import resource, hayai._native as native\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)\n"
        "try:\n"
        "    native.read_bandwidth(bytes=16 << 20, threads=1000, huge_pages=False, repeats=1)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "of 1000 threads" in done.stdout
