"""Rewrites: the plan before and after gives the same on the reference backend."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hayai.config import ModelConfig
from hayai.errors import PlanError
from hayai.models.registry import build_plans
from hayai.plan import ops
from hayai.plan.builder import PlanBuilder
from hayai.plan.passes import remove_dead, reuse_buffers, shard
from hayai.plan.plan import CacheGroup, Plan, WeightSlot
from hayai.plan.validate import validate
from tiny_models import GLM, LLAMA, LockstepRanks, Sequences, compile_reference, glm_tensors, llama_tensors

CONFIGS = {"llama": LLAMA, "glm": GLM}
IDS = np.random.default_rng(4).integers(0, 96, 40).tolist()


def tensors_of(config: ModelConfig) -> dict[str, np.ndarray]:
    return llama_tensors(config) if config.architecture == "llama" else glm_tensors(config)


def run(plans: dict[str, Plan], config: ModelConfig) -> np.ndarray:
    """Logits of a prompt in two chunks, and of the draft plan after each where there is one."""
    sequences = Sequences(compile_reference(plans, tensors_of(config)), plans["main"])
    return run_steps(sequences, "draft" in plans)


def run_steps(sequences: Sequences, draft: bool) -> np.ndarray:
    found = []
    for start, stop in ((0, 23), (23, 39)):
        found.append(sequences.logits({0: IDS[start:stop]}))
        if draft:
            rows = np.arange(stop - start, dtype=np.int32)
            following = IDS[start + 1 : stop + 1]
            found.append(sequences.logits({0: following}, plan="draft", at={0: start}, carry_rows=rows))
    return np.concatenate(found)


def with_dead_ops(plan: Plan) -> Plan:
    """The plan with a chain of ops in its middle that leads nowhere."""
    extra = WeightSlot("extra", (8, plan.slots["embed"].shape[1]), {"hf": ("model.embed_tokens.weight",)})
    builder = PlanBuilder(plan.name, dict(plan.buffers), {**plan.slots, "extra": extra}, dict(plan.groups))
    dead = [
        ops.Linear("normed", ("extra",), (builder.buffer("dead", "T", 8),)),
        ops.Activation("dead", builder.buffer("deader", "T", 8), "relu"),
    ]
    middle = len(plan.ops) // 2
    builder.ops = [*plan.ops[:middle], *dead, *plan.ops[middle:]]
    return builder.build(*plan.outputs)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_dead_ops_go_and_nothing_else(config: ModelConfig) -> None:
    plan = build_plans(config, "hf")["main"]
    cleaned = remove_dead(with_dead_ops(plan))
    assert cleaned.ops == plan.ops
    assert set(cleaned.slots) == set(plan.slots)
    assert "dead" not in cleaned.buffers


def test_a_value_that_is_overwritten_unread_is_dead() -> None:
    plan = build_plans(LLAMA, "hf")["main"]
    at = next(i for i, op in enumerate(plan.ops) if "normed" in op.names("writes"))
    padded = replace(plan, ops=(*plan.ops[:at], ops.Copy("hidden", "normed"), *plan.ops[at:]))
    validate(padded)
    assert remove_dead(padded).ops == plan.ops


def test_dead_ops_take_what_feeds_them_along() -> None:
    """A plan with nothing but its cache as result keeps what fills the cache."""
    plan = replace(build_plans(LLAMA, "hf")["main"], outputs=())
    cleaned = remove_dead(plan)
    kinds = [op.kind for op in cleaned.ops]
    assert kinds.count("kv_append") == LLAMA.num_layers
    assert kinds[-1] == "kv_append"
    assert kinds.count("attention") == LLAMA.num_layers - 1
    assert "lm_head" not in cleaned.slots


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_reused_buffers_compute_the_same(config: ModelConfig) -> None:
    plans = build_plans(config, "hf")
    smaller = {name: reuse_buffers(plan) for name, plan in plans.items()}
    for name, plan in plans.items():
        assert len(smaller[name].buffers) < len(plan.buffers)
        assert {"logits", "sampled"} <= set(smaller[name].buffers)
    np.testing.assert_array_equal(run(smaller, config), run(plans, config))


def test_ops_in_place_stay_in_place() -> None:
    for op in reuse_buffers(build_plans(LLAMA, "hf")["main"]).ops:
        if isinstance(op, ops.Rope):
            assert op.x == op.out
        if isinstance(op, ops.Add):
            assert op.a == op.out


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    "config",
    [
        replace(LLAMA, num_kv_heads=4),
        replace(LLAMA, num_kv_heads=4, tied_head=True, attention_bias=True),
        GLM,
    ],
    ids=["llama", "tied, biases", "glm"],
)
def test_sharded_ranks_compute_the_same(config: ModelConfig, world: int) -> None:
    plans, tensors = build_plans(config, "hf"), tensors_of(config)
    whole = run(plans, config)
    ranks = [
        {name: remove_dead(shard(plan, rank, world)) for name, plan in plans.items()} for rank in range(world)
    ]
    runners = [compile_reference(mine, tensors) for mine in ranks]
    together = run_steps(Sequences(LockstepRanks(runners), plans["main"]), "draft" in plans)
    np.testing.assert_allclose(together, whole, atol=2e-5)


def test_a_rank_holds_its_share_of_the_weights() -> None:
    plan = build_plans(LLAMA, "hf")["main"]
    cut = shard(plan, 1, 2)
    assert cut.slots["layers.0.q"].shape == (32, 64)
    assert cut.slots["layers.0.o"].shape == (64, 32)
    assert cut.slots["lm_head"].shape == (48, 64)
    assert cut.slots["embed@lm_head"].shape == (48, 64)
    assert cut.groups["kv"].num_heads == 1
    assert cut.slots["layers.0.attn_norm"] == plan.slots["layers.0.attn_norm"]
    kinds = [op.kind for op in cut.ops]
    assert kinds.count("all_reduce") == 2 * LLAMA.num_layers
    assert kinds.count("all_gather") == 1


def test_routed_and_shared_experts_share_one_sum() -> None:
    cut = shard(build_plans(GLM, "hf")["main"], 0, 2)
    assert [op.kind for op in cut.ops].count("all_reduce") == 2 * GLM.num_layers


def test_one_rank_is_the_plan_itself() -> None:
    plan = build_plans(LLAMA, "hf")["main"]
    assert shard(plan, 0, 1) is plan


@pytest.mark.parametrize(
    ("config", "world", "message"),
    [
        (LLAMA, 4, "heads of group kv: 2 can't be shared out to 4 ranks"),
        (replace(LLAMA, num_kv_heads=4, ffn_size=66), 4, r"op 10 linear: rows of weight layers\.0\.gate: 66"),
        (replace(LLAMA, vocab_size=97), 2, "lm_head: rows of weight lm_head: 97"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(config: ModelConfig, world: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        shard(build_plans(config, "hf")["main"], 0, world)


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(PlanError, match="rank 2 is not one of 2"):
        shard(build_plans(LLAMA, "hf")["main"], 2, 2)


def _state_plan() -> PlanBuilder:
    plan = PlanBuilder("main")
    plan.group(CacheGroup("state", "state", 1, 2, 4, 4, can_rollback=False))
    plan.slot(WeightSlot("embed", (96, 8), {"hf": ("e",)}))
    plan.add(ops.Embed("tokens", "embed", plan.buffer("x", "T", 8)))
    plan.add(ops.LinearState("x", "x", "x", "x", plan.buffer("y", "T", 8), "state", 0, 2, 4, 4))
    return plan


def test_ops_that_can_not_be_cut_are_named() -> None:
    plan = _state_plan().build("y")
    validate(plan)
    with pytest.raises(PlanError, match="op 1 linear_state: can't be cut for tensor parallelism"):
        shard(plan, 0, 2)
