"""The reference runner: what it checks, what it gives back, and the default model's answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hayai.backends.base import Limits, SamplingRow, StepInput
from hayai.backends.reference import ReferenceBackend, ReferenceRunner
from hayai.backends.sampling_reference import sample_row
from hayai.errors import ConfigError, ModelError, PlanError
from hayai.models.registry import build_plans
from hayai.weights.gguf import GgufFile, model_config
from hayai.weights.loader import FileWeights
from tiny_models import (
    GLM,
    LIMITS,
    LLAMA,
    MemoryFile,
    Sequences,
    compile_reference,
    glm_tensors,
    llama_tensors,
)

PLANS = build_plans(LLAMA, "hf")
GOOD = StepInput(
    token_ids=np.array([1, 2, 3, 4], np.int32),
    positions=np.array([0, 1, 2, 0], np.int32),
    query_start=np.array([0, 3, 4], np.int32),
    block_tables={"kv": np.array([[0], [1]], np.int32)},
    logit_rows=np.array([2, 3], np.int32),
    sampling=(SamplingRow(), SamplingRow()),
)


@pytest.fixture(scope="module")
def runner() -> ReferenceRunner:
    return compile_reference(PLANS, llama_tensors(LLAMA))


def ints(*values: int) -> Any:
    return np.array(values, np.int32)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"positions": np.array([0, 1, 2, 0])}, "positions must be a vector of int32"),
    "no tokens": (
        {
            "token_ids": ints(),
            "positions": ints(),
            "query_start": ints(0, 0),
            "logit_rows": ints(),
            "sampling": (),
        },
        "at most 128 tokens are allowed, at least 1",
    ),
    "unlike lengths": ({"positions": ints(0, 1, 2)}, "positions and token_ids differ in length"),
    "query_start": ({"query_start": ints(0, 3, 5)}, r"query_start \[0, 3, 5\] does not cut"),
    "token outside the vocabulary": ({"token_ids": ints(1, 2, 3, 96)}, "token ids must be from 0 to 95"),
    "negative token": ({"token_ids": ints(1, 2, 3, -1)}, "token ids must be from 0 to 95"),
    "beyond the context": ({"positions": ints(0, 1, 2, 256)}, "positions must be below 256"),
    "row outside the step": ({"logit_rows": ints(2, 4)}, "logit_rows must index tokens"),
    "sampling rows": ({"sampling": (SamplingRow(),)}, "1 sampling rows"),
    "masks": ({"masks": (None,)}, "masks must be empty or have one entry per row"),
    "positions with a hole": ({"positions": ints(0, 1, 3, 0)}, "sequence 0 are not consecutive"),
    "no table": ({"block_tables": {}}, "no block table for group kv"),
    "short table": ({"positions": ints(0, 1, 2, 16)}, "group kv: 2 blocks are needed"),
    "block outside the cache": ({"block_tables": {"kv": np.array([[0], [96]], np.int32)}}, r"numbers \[96\]"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_a_step_that_breaks_the_contract(
    runner: ReferenceRunner, changes: dict[str, Any], message: str
) -> None:
    runner.step(GOOD)
    with pytest.raises(ValueError, match=message):
        runner.step(replace(GOOD, **changes))


def test_plan_inputs_must_be_given() -> None:
    plans = build_plans(GLM, "hf")
    sequences = Sequences(compile_reference(plans, glm_tensors(GLM)), plans["main"])
    sequences.step({0: [1, 2, 3]})
    with pytest.raises(ValueError, match="plan draft needs carry_rows"):
        sequences.step({0: [2, 3, 4]}, plan="draft", at={0: 0})
    with pytest.raises(PlanError, match="there is no plan 'verify'; plans: main, draft"):
        sequences.step({0: [2]}, plan="verify")


def test_outputs(runner: ReferenceRunner) -> None:
    sampling = (SamplingRow(num_logprobs=3), SamplingRow(temperature=0.9, seed=4))
    bare = runner.step(replace(GOOD, sampling=sampling))
    assert bare.logits is None
    out = runner.step(replace(GOOD, sampling=sampling, want_logits=True))
    assert out.logits is not None
    assert out.logits.shape == (2, LLAMA.vocab_size)
    assert out.tokens.dtype == np.int32
    assert out.tokens.tolist() == bare.tokens.tolist()
    assert out.tokens[0] == out.logits[0].argmax()
    assert out.tokens[1] == sample_row(out.logits[1], sampling[1], 0).token
    assert out.top_ids[0].tolist() == np.argsort(-out.logits[0], kind="stable")[:3].tolist()
    assert len(out.top_ids[1]) == 0
    assert np.isnan(out.logprobs).tolist() == [False, True]
    assert runner.vocab_size == LLAMA.vocab_size


def test_masks_and_histories_reach_the_sampler(runner: ReferenceRunner) -> None:
    free = runner.step(GOOD).tokens
    mask = np.full(3, 0xFFFFFFFF, np.uint32)
    token = int(free[1])
    mask[token // 32] &= np.uint32(0xFFFFFFFF ^ (1 << token % 32))
    out = runner.step(replace(GOOD, masks=(None, mask))).tokens
    assert out[0] == free[0]
    assert out[1] != token


def test_copied_blocks_continue_alike(runner: ReferenceRunner) -> None:
    sequences = Sequences(runner, PLANS["main"], 3)
    sequences.step({0: range(20)})
    sequences.lengths[1] = 20
    sequences.tables["kv", 1] = [sequences.free["kv"].pop() for _ in range(2)]
    source, target = (np.array(sequences.tables["kv", s], np.int32) for s in (0, 1))
    runner.copy_blocks("kv", source, target)
    a, b = sequences.logits({0: [7]}), sequences.logits({1: [7]})
    np.testing.assert_array_equal(a, b)


def test_describe(runner: ReferenceRunner) -> None:
    described = runner.describe()
    assert described["backend"] == "reference"
    assert described["ops"] == len(PLANS["main"].ops)


def test_weights_of_another_shape_are_refused() -> None:
    tensors = llama_tensors(LLAMA)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:-1]
    with pytest.raises(ModelError, match=r"layers\.0\.up"):
        compile_reference(PLANS, tensors)


def test_slots_and_groups_must_agree_between_plans() -> None:
    main = PLANS["main"]
    other = replace(
        main, name="other", slots={**main.slots, "embed": replace(main.slots["embed"], shard="rows")}
    )
    source = FileWeights(MemoryFile(llama_tensors(LLAMA)), "hf")
    with pytest.raises(PlanError, match="weight slot embed differs between plans main, other"):
        ReferenceBackend().compile({"main": main, "other": other}, source, LIMITS)
    other = replace(main, name="other", groups={"kv": replace(main.groups["kv"], can_rollback=False)})
    with pytest.raises(PlanError, match="cache group kv differs between plans"):
        ReferenceBackend().compile({"main": main, "other": other}, source, LIMITS)


def test_unknown_kv_dtype() -> None:
    with pytest.raises(ConfigError, match="kv_dtype must be f16 or f32: 'f8'"):
        compile_reference(PLANS, llama_tensors(LLAMA), kv_dtype="f8")


# ---------------------------------------------------------------- the default model

QUESTION = (1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198)
"""<|im_start|>user\\nWhat is the capital of France?<|im_end|>\\n<|im_start|>assistant\\n"""
ANSWER = (504, 3575, 282, 4649, 314, 7042, 30, 2)
"""The capital of France is Paris.<|im_end|>"""


@pytest.mark.model
@pytest.mark.parametrize("quantize", [False, True], ids=["float32", "int8 activations"])
def test_the_default_model_answers(default_model: Path, quantize: bool) -> None:
    """Greedy choices along prompt and answer, in two chunks. The file may be closed after compile."""
    with GgufFile(default_model) as file:
        plans = build_plans(model_config(file))
        backend = ReferenceBackend(quantize_activations=quantize)
        runner = backend.compile(plans, FileWeights(file), Limits(64, 2, 64, 16, 256))
    ids, found = QUESTION + ANSWER, []
    for first, stop in ((0, 6), (6, len(ids) - 1)):
        rows = range(max(first, len(QUESTION) - 1), stop)
        out = runner.step(
            StepInput(
                token_ids=ints(*ids[first:stop]),
                positions=np.arange(first, stop, dtype=np.int32),
                query_start=ints(0, stop - first),
                block_tables={"kv": ints(5, 2, 9, 0)[None]},
                logit_rows=ints(*(row - first for row in rows)),
                sampling=(SamplingRow(),) * len(rows),
            )
        )
        found += out.tokens.tolist()
    assert tuple(found) == ANSWER
