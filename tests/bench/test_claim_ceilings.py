"""Ceilings of claims: against figures worked out by hand, limits, and what a claim asks for."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest

from hayai.bench.claim import KV_BITS, PRECISIONS, Hardware, Setup, ceiling, footprint, judge
from hayai.bench.claim_models import find_model, named_model, shape_rows
from hayai.bench.claim_points import find_hardware
from hayai.bench.claims import step_bytes
from hayai.errors import ConfigError

GLM = named_model("glm-5.1")


def glm(hardware: str = "b200", precision: str | None = "fp8", **more: Any) -> Setup:
    setup = Setup(GLM, find_hardware(hardware), precision, kv="fp8", devices=8)
    return replace(setup, **more)


# ---------------------------------------------------------------- counts by hand


def test_bytes_of_a_glm_step_by_part() -> None:
    """GLM-5 in fp8: 13.6 attention and index, 0.7 dense, 2.8 shared, 22.6 routed, 1.9 head, 0.2 router."""
    parts = {part: size / 1e9 for part, size in ceiling(glm()).plain.weights.items()}
    assert parts["routed experts"] == pytest.approx(75 * 8 * 3 * 6144 * 2048 / 1e9, rel=1e-3)
    assert parts["head"] == pytest.approx(154880 * 6144 * 2 / 1e9)
    assert parts["matrices"] == pytest.approx(13.6 + 0.7 + 2.8 + 0.2, abs=0.1)
    assert sum(parts.values()) == pytest.approx(41.9, abs=0.05)


@pytest.mark.parametrize(
    ("hardware", "precision", "plain", "speculative"),
    [
        ("h100", "fp8", 640, 756), ("h200", "fp8", 916, 1084), ("b200", "fp8", 1527, 1806),
        ("h100", "fp4-experts", 838, 1141), ("h200", "fp4-experts", 1200, 1634),
        ("b200", "fp4-experts", 2000, 2724),
    ],
)  # fmt: skip
def test_ceilings_worked_out_by_hand(hardware: str, precision: str, plain: int, speculative: int) -> None:
    """Context 0, 8 devices; with 3 drafts and 3.2 tokens per step, rows routing independently."""
    setup = glm(hardware, precision)
    assert ceiling(setup).per_request == pytest.approx(plain, rel=2e-3)
    three = ceiling(replace(setup, drafts=3, tokens_per_step=3.2))
    assert three.per_request == pytest.approx(speculative, rel=2e-3)
    assert three.hard > three.per_request


def test_four_rows_touch_the_expected_distinct_experts() -> None:
    """256 * (1 - (1 - 8/256)^4) = 30.5 experts of 32 draws; verification reads 105.7 GB, drafts 7.7 GB."""
    bound = ceiling(glm(drafts=3, tokens_per_step=3.2))
    one, four = (step.weights["routed experts"] for step in (bound.plain, bound.verify))
    assert four / one == pytest.approx(256 * (1 - (1 - 8 / 256) ** 4) / 8)
    assert bound.draft is not None
    assert bound.verify.total_bytes / 1e9 == pytest.approx(105.7, abs=0.1)
    assert 3 * bound.draft.total_bytes / 1e9 == pytest.approx(7.7, abs=0.05)


@pytest.mark.parametrize(("kv", "layers", "size"), [("bf16", 78, 1152 + 256), ("fp8", 78, 656 + 132)])
def test_cached_bytes_of_a_position(kv: str, layers: int, size: int) -> None:
    """Latent and index keys of every layer; the draft layer caches too."""
    assert footprint(glm(kv=kv))[1] == pytest.approx((layers + 1) * size)


def test_context_costs_the_index_and_not_more_latents_than_are_selected() -> None:
    short, long = (ceiling(glm(context=context)).plain.kv_bytes for context in (2048, 131072))
    index = 78 * 132
    assert long - short == pytest.approx((131072 - 2048) * index, rel=1e-6)


def test_llama_8b_on_one_h100() -> None:
    """3.35 TB/s over 16 bits a weight: 209 tok/s before keys and values (the embedding is not read)."""
    setup = Setup(named_model("llama-3.1-8b"), find_hardware("h100"), "bf16")
    read = 8.03e9 - 128256 * 4096
    assert ceiling(setup).per_request == pytest.approx(3350e9 / (2 * read), rel=2e-3)
    kv = ceiling(replace(setup, context=8192)).plain.kv_bytes - ceiling(setup).plain.kv_bytes
    assert kv == pytest.approx(8191 * 32 * 2 * 8 * 128 * 2)


def test_the_default_model_agrees_with_the_bytes_of_the_bench(default_model: Path) -> None:
    """The plan's costs in the file's own bits are what claims.py counts from the file, head read whole."""
    setup = Setup(find_model(str(default_model)), Hardware("here", "here", 27.0), None, context=1024)
    counted = step_bytes(default_model).total(1024)
    assert ceiling(setup).plain.total_bytes == pytest.approx(counted, rel=5e-4)


def test_the_default_model_has_the_shape_that_is_shipped(default_model: Path) -> None:
    file, shape = find_model(str(default_model)), named_model("smollm2-135m")
    a, b = ({name: slot.shape for name, slot in m.plans["main"].slots.items()} for m in (file, shape))
    assert a == b


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("glm-5.1", 743.91), ("glm-4.7-flash", 29.94), ("deepseek-r1", 671.0), ("llama-2-70b", 68.98),
        ("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.55), ("smollm2-135m", 0.13452),
    ],
)  # fmt: skip
def test_shapes_have_as_many_parameters_as_the_models(name: str, billions: float) -> None:
    """Of the main model, a tied head once."""
    model = named_model(name)
    slots = model.plans["main"].slots.values()
    tied = {"lm_head"} if model.config.tied_head else set()
    assert sum(prod(s.shape) for s in slots if s.name not in tied) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_the_draft_layer_is_held_in_memory_too() -> None:
    """753.86 B parameters with it."""
    assert footprint(glm(precision="bf16"))[0] / 2e9 == pytest.approx(753.86, rel=1e-4)


def test_every_shape_and_precision_has_a_ceiling() -> None:
    for name in shape_rows():
        for precision in PRECISIONS:
            for kv in KV_BITS:
                assert ceiling(Setup(named_model(name), find_hardware("h200"), precision, kv)).per_request > 0


# ---------------------------------------------------------------- devices, batch, latency


def test_collectives_come_from_the_plan_cut_for_the_devices() -> None:
    """Two all-reduces per layer and the gathering of the logits; a latency of 10 us adds 1.57 ms."""
    free, slow = ceiling(glm()), ceiling(glm(collective_us=10.0))
    assert free.plain.collectives == 2 * 78 + 1
    assert slow.step_s - free.step_s == pytest.approx(157 * 10e-6)
    assert ceiling(glm(devices=1)).plain.collectives == 0


def test_a_pipeline_has_the_speed_of_one_device_and_the_memory_of_all() -> None:
    pipe, one = ceiling(glm(parallel="pp")), ceiling(glm(devices=1))
    assert pipe.per_request == pytest.approx(one.per_request)
    assert pipe.fits is True and one.fits is False
    copies = ceiling(glm(parallel="replicas", batch=16))
    assert copies.fits is False
    assert copies.total == pytest.approx(16 * copies.per_request)
    assert copies.plain.kv_bytes == pytest.approx(ceiling(glm(devices=1, batch=2)).plain.kv_bytes)


def test_a_batch_trades_speed_of_one_for_speed_of_all_until_arithmetic_binds() -> None:
    bounds = [ceiling(glm(batch=batch)) for batch in (1, 8, 64, 65536)]
    assert all(a.per_request > b.per_request for a, b in pairwise(bounds))
    assert all(a.total < b.total for a, b in pairwise(bounds))
    assert bounds[0].verify.bound == "memory" and bounds[-1].verify.bound != "memory"


def test_unknown_rates_bound_nothing() -> None:
    step = ceiling(glm("mi355x")).plain
    assert step.compute_s is None and step.link_s is None and step.seconds == step.memory_s


# ---------------------------------------------------------------- a claim


def test_the_vendors_claim_taken_apart() -> None:
    """400 tok/s at 2.76 tokens and 1.56 plain steps per step: 57 us a layer, a base of 226 tok/s. From a base
    of 224 tok/s: 2.8 tokens per step."""
    setup = glm(context=1024, drafts=3, tokens_per_step=2.76, step_cost=1.56)
    bound = ceiling(setup)
    verdict = judge(setup, bound, 400, base_speed=224)
    assert verdict.possible == "not excluded" and 0.2 < verdict.share < 0.3
    assert verdict.plain_speed == pytest.approx(400 * 1.56 / 2.76)
    assert round(verdict.layer_us) == 57
    text = "\n".join(verdict.needs)
    for words in ("57 microseconds per layer", "at least 2.8 tokens per step", "at least 4 devices"):
        assert words in text
    # a measured cost never lifts the ceiling above what is counted
    assert bound.per_request <= ceiling(replace(setup, step_cost=None)).per_request


def test_verdicts_on_both_sides_of_the_limits() -> None:
    setup = glm(drafts=3, tokens_per_step=3.2)
    bound = ceiling(setup)
    words = [
        judge(setup, bound, c).possible
        for c in (bound.per_request - 1, bound.per_request + 1, bound.hard + 1)
    ]
    assert words == ["not excluded", "only with shared experts", "impossible"]
    small = glm("h100")
    assert [judge(small, ceiling(small), c).possible for c in (400, 700)] == ["does not fit", "impossible"]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"precision": None}, "name one of bf16, fp8"),
        ({"precision": "fp5"}, "supported: bf16"),
        ({"kv": "fp6"}, "supported: bf16, fp8"),
        ({"parallel": "ep"}, "supported: tp, pp"),
        ({"context": 1e6}, "counted up to 202752"),
        ({"tokens_per_step": 2.0}, "need drafts"),
        ({"drafts": 1, "tokens_per_step": 2.5}, "1 drafts give 2"),
        ({"step_cost": 1.5}, "needs drafts"),
        ({"devices": 7}, "tensor parallel over 7 devices"),
    ],
)
def test_contradictions_are_named(change: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        ceiling(glm(**change))
