"""validate(): every way in which a plan can fail to hold together names op, index and field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from hayai.errors import PlanError
from hayai.models.registry import build_plans
from hayai.plan import ops
from hayai.plan.builder import PlanBuilder
from hayai.plan.costs import COSTS
from hayai.plan.ops import ALL_OPS, RopeScaling
from hayai.plan.plan import Buffer, CacheGroup, Plan, Transform, WeightSlot
from hayai.plan.shapes import SHAPE_RULES
from hayai.plan.validate import dump, validate
from tiny_models import GLM, LLAMA

MAIN = build_plans(LLAMA, "hf")["main"]
DRAFT = build_plans(GLM, "hf")["draft"]
GLM_MAIN = build_plans(GLM, "hf")["main"]


def index_of(plan: Plan, kind: type[ops.Op]) -> int:
    return next(i for i, op in enumerate(plan.ops) if type(op) is kind)


def with_op(plan: Plan, kind: type[ops.Op], **changes: object) -> Plan:
    """The plan with fields of its first op of a kind changed."""
    at = index_of(plan, kind)
    changed = replace(plan.ops[at], **changes)  # type: ignore[arg-type]
    return replace(plan, ops=(*plan.ops[:at], changed, *plan.ops[at + 1 :]))


def with_slot(name: str, **changes: object) -> Plan:
    slot = replace(MAIN.slots[name], **changes)  # type: ignore[arg-type]
    return replace(MAIN, slots={**MAIN.slots, name: slot})


def with_buffer(plan: Plan, name: str, *shape: int | str, dtype: str = "f32") -> Plan:
    return replace(plan, buffers={**plan.buffers, name: Buffer(name, shape, dtype)})


def without(table: str, name: str) -> Plan:
    kept = {k: v for k, v in getattr(MAIN, table).items() if k != name}
    return replace(MAIN, **{table: kept})


BAD: dict[str, tuple[Callable[[], Plan], str]] = {
    "undeclared buffer": (
        lambda: without("buffers", "q"),
        r"op 2 linear, field outs: buffer q is not declared",
    ),
    "undeclared slot": (
        lambda: without("slots", "layers.0.k"),
        r"op 2 linear, field weights: weight slot layers\.0\.k is not declared",
    ),
    "undeclared group": (
        lambda: without("groups", "kv"),
        r"op 5 kv_append, field group: cache group kv is not declared",
    ),
    "read before written": (
        lambda: replace(MAIN, ops=MAIN.ops[1:]),
        r"op 0 rms_norm, field x: buffer hidden is read before it is written",
    ),
    "written input": (
        lambda: with_op(MAIN, ops.Sample, out="tokens"),
        r"sample, field out: tokens has shape \(T\), must be \(R\)",
    ),
    "written input of the right shape": (
        lambda: with_op(MAIN, ops.Sample, out="logit_rows"),
        r"sample, field out: logit_rows is an input of the step and is read only",
    ),
    "unused slot": (
        lambda: replace(MAIN, slots={**MAIN.slots, "extra": replace(MAIN.slots["embed"], name="extra")}),
        r"weight slot extra is not used \(1 in all\)",
    ),
    "undeclared output": (lambda: replace(MAIN, outputs=("nothing",)), "output nothing is not a declared"),
    "unwritten output": (
        lambda: replace(with_buffer(MAIN, "later", "T"), outputs=("later",)),
        "output later is never written",
    ),
    "slot shape": (
        lambda: with_slot("layers.0.q", shape=(64, 63)),
        r"op 2 linear, field weights: layers\.0\.q has shape \(64,63\), must be \(64,64\)",
    ),
    "buffer shape": (
        lambda: with_buffer(MAIN, "gate", "T", 95),
        r"op 10 linear, field outs: gate has shape \(T,95\), must be \(T,96\)",
    ),
    "symbol": (
        lambda: with_buffer(MAIN, "rows", "T", 64),
        r"gather_rows, field out: rows has shape \(T,64\), must be \(R,64\)",
    ),
    "rank": (
        lambda: with_buffer(MAIN, "hidden", "T", 8, 8),
        r"op 0 embed, field out: hidden has shape \(T,8,8\)",
    ),
    "dtype": (
        lambda: replace(MAIN, buffers={**MAIN.buffers, "tokens": Buffer("tokens", ("T",), "f32")}),
        r"op 0 embed, field ids: tokens is f32, must be i32",
    ),
    "dtype of a result": (
        lambda: replace(MAIN, buffers={**MAIN.buffers, "sampled": Buffer("sampled", ("R",))}),
        r"sample, field out: sampled is f32, must be i32",
    ),
    "copied dtype": (
        lambda: with_op(with_buffer(DRAFT, "ints", "T", 64, dtype="i32"), ops.Copy, out="ints"),
        r"copy, field out: ints is i32, final is f32",
    ),
    "kv heads do not divide": (
        lambda: with_op(MAIN, ops.Attention, num_kv_heads=3),
        r"op 6 attention, field num_kv_heads: 4 query heads can't be shared out over 3 kv heads",
    ),
    "kv heads of the group": (
        lambda: with_op(MAIN, ops.Attention, num_kv_heads=4),
        r"attention, field num_kv_heads: 4, but group kv says 2",
    ),
    "layer outside the group": (
        lambda: with_op(MAIN, ops.KvAppend, layer=3),
        r"op 5 kv_append, field layer: layer 3 is outside group kv of 3 layers",
    ),
    "values for an index cache": (
        lambda: with_op(GLM_MAIN, ops.KvAppend, group="index"),
        r"kv_append, field v: does not fit a group of kind index",
    ),
    "attention over an index": (
        lambda: with_op(GLM_MAIN, ops.Attention, group="index"),
        "attention, field group: group index is of kind index, needs full or window or mla",
    ),
    "query rope without mla": (
        lambda: with_op(MAIN, ops.Attention, q_rope="q"),
        "attention, field q_rope: does not fit a group of kind full",
    ),
    "group kind": (
        lambda: replace(MAIN, groups={"kv": replace(MAIN.groups["kv"], kind="ring")}),
        "cache group kv: kind 'ring' is not one of full, window, mla, index, state",
    ),
    "activation": (
        lambda: with_op(MAIN, ops.Glu, act="relu"),
        "op 11 glu, field act: 'relu' is not one of silu, gelu, gelu_tanh",
    ),
    "odd rotary dim": (lambda: with_op(MAIN, ops.Rope, rotary_dim=7), "field rotary_dim: 7 is not even"),
    "rope outside the head": (
        lambda: with_op(MAIN, ops.Rope, start=4),
        r"rope, field rotary_dim: dims 4\.\.19 are outside a head of 16",
    ),
    "rope scaling": (
        lambda: with_op(MAIN, ops.Rope, scaling=RopeScaling("yarn")),
        "rope, field scaling: 'yarn' is not one of linear, llama3, factors",
    ),
    "rope factors without a slot": (
        lambda: with_op(MAIN, ops.Rope, scaling=RopeScaling("factors")),
        "rope, field scaling: a factors slot belongs to kind 'factors'",
    ),
    "outputs of a group": (
        lambda: with_op(MAIN, ops.Linear, outs=("q", "k")),
        "linear, field outs: 2 outputs for 3 matrices",
    ),
    "biases of a group": (
        lambda: with_op(MAIN, ops.Linear, biases=("layers.0.attn_norm",)),
        "linear, field biases: 1 biases for 3 matrices",
    ),
    "too many experts": (
        lambda: with_op(GLM_MAIN, ops.Route, top_k=9),
        "route, field top_k: 9 of 8 experts",
    ),
    "router score": (lambda: with_op(GLM_MAIN, ops.Route, score="tanh"), "route, field score: 'tanh' is not"),
    "fallback": (
        lambda: with_slot("lm_head", fallback="nothing"),
        "weight slot lm_head: fallback nothing is not declared",
    ),
    "fallback of another shape": (
        lambda: with_slot("lm_head", fallback="final_norm"),
        r"fallback final_norm has shape \(64\), must be \(96,64\)",
    ),
    "fallback to itself": (
        lambda: with_slot("lm_head", fallback="lm_head"),
        "weight slot lm_head: fallbacks form a circle",
    ),
    "transform": (
        lambda: with_slot("embed", transforms=(Transform("transpose"),)),
        "weight slot embed: transform 'transpose' is not one of rows, columns",
    ),
    "no source": (lambda: with_slot("embed", sources={}), "weight slot embed: no container names a source"),
    "empty slot": (
        lambda: with_slot("embed", shape=(0, 64)),
        r"weight slot embed: shape \(0,64\) has an empty dimension",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD.keys())
def test_a_broken_plan_is_refused(make: Callable[[], Plan], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        validate(make())


@pytest.mark.parametrize("plan", [MAIN, GLM_MAIN, DRAFT], ids=["llama", "glm", "draft"])
def test_the_plans_themselves_hold_together(plan: Plan) -> None:
    validate(plan)


def test_an_op_outside_the_list_is_refused() -> None:
    @dataclass(frozen=True)
    class Fancy(ops.Op):
        x: str
        reads = ("x",)

    with pytest.raises(PlanError, match="op 42: Fancy is not in the op list"):
        validate(replace(MAIN, ops=(*MAIN.ops[:42], Fancy("hidden"))))
    with pytest.raises(PlanError, match="Fancy is not in the op list"):
        PlanBuilder("main").add(Fancy("hidden"))


def test_every_op_has_a_shape_rule_and_a_cost() -> None:
    assert set(SHAPE_RULES) == set(ALL_OPS) == set(COSTS)


def test_declaring_twice_must_agree() -> None:
    plan = PlanBuilder("main")
    plan.buffer("x", "T", 4)
    assert plan.buffer("x", "T", 4) == "x"
    with pytest.raises(PlanError, match="buffer x declared twice"):
        plan.buffer("x", "T", 5)
    plan.slot(WeightSlot("w", (4,), {"hf": ("w",)}))
    with pytest.raises(PlanError, match="weight slot w declared twice"):
        plan.slot(WeightSlot("w", (5,), {"hf": ("w",)}))
    plan.group(CacheGroup("kv", "full", 1, 1, 4, 4))
    with pytest.raises(PlanError, match="cache group kv declared twice"):
        plan.group(CacheGroup("kv", "full", 2, 1, 4, 4))


def test_dump_has_one_line_an_op() -> None:
    for plan in (MAIN, GLM_MAIN, DRAFT):
        text = dump(plan)
        lines = text[text.index("\nops\n") + 5 :].splitlines()
        assert len(lines) == len(plan.ops)
        for line, op in zip(lines, plan.ops, strict=True):
            assert f" {op.kind}: " in line
            assert all(name in line for table in ("reads", "writes", "slots") for name in op.names(table))
        assert text == dump(plan)
