"""Is a speed claim physically possible? The floor of the time per token, from the model's own plan.

    memory   bytes of a step / (bandwidth of all devices that work on it)
    compute  operations of a step / (their peak rate in the precision's arithmetic)
    link     bytes of its all-reduces / link bandwidth of one device
    step     max(memory, compute, link) + collectives * their latency
    ceiling  tokens per step / step                          (tok/s of one request)

Bytes: every weight that the step touches once (of experts the expected distinct ones: 1 - (1 - k/E)^rows),
keys, values and index keys at the context. Activations stay on the chip, work is shared out without a rest,
memory runs at its peak, and the three overlap completely: what is left out can only lower a speed, so a
claim above the ceiling is impossible, one below it is merely not excluded. Tokens that choose the same
experts touch fewer of them; `hard_ceiling` lets all tokens of a step share one token's experts.

With speculation a step is the verification of 1 + drafts rows per request and one pass of the draft plan per
draft, where the model has one (a draft model from outside counts nothing). A measured `step_cost` (of a
speculative step over a plain one) can only lower the ceiling; it is what a claim is taken apart with.
Source of the counts: plan/costs.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from hayai.bench.claim_models import ClaimModel
from hayai.errors import ConfigError, PlanError
from hayai.plan import ops
from hayai.plan.costs import Traffic, bytes_moved, flops
from hayai.plan.plan import Plan
from hayai.plan.shard import shard

FP8_BITS = 8 + 32 / (128 * 128)
"""e4m3 with one fp32 scale per block of 128 x 128."""
FP4_BITS = 4 + 8 / 16
"""NVFP4: e2m1 with one e4m3 scale per 16."""
ACTIVATION_BYTES = 2
"""Of one number in an all-reduce."""


@dataclass(frozen=True)
class Precision:
    """Bits per weight by part, and the arithmetic it may use: the first that the hardware's row has."""

    title: str
    matrices: float
    experts: float
    compute: tuple[str, ...]
    other: float = 16.0


PRECISIONS: Mapping[str, Precision] = {
    "bf16": Precision("every weight 16 bits", 16, 16, ("bf16",)),
    "fp8": Precision(
        "matrices and experts fp8 in blocks; router, head, embedding 16", FP8_BITS, FP8_BITS, ("fp8", "bf16")
    ),
    "int8": Precision("matrices and experts 8 bits; router, head, embedding 16", 8, 8, ("int8", "bf16")),
    "fp4-experts": Precision("experts NVFP4, other matrices fp8", FP8_BITS, FP4_BITS, ("fp4", "fp8", "bf16")),
    "fp4-experts-bf16": Precision("experts NVFP4, all else 16 bits", 16, FP4_BITS, ("fp4", "fp8", "bf16")),
    "nvfp4": Precision("matrices and experts NVFP4", FP4_BITS, FP4_BITS, ("fp4", "fp8", "bf16")),
    "int4": Precision("matrices and experts 4 bits, groups of 128", 4.125, 4.125, ("int8", "fp8", "bf16")),
}

KV_BITS: Mapping[str, Mapping[str, float]] = {
    "bf16": {},
    "fp8": {"full": 8, "window": 8, "mla": 656 * 8 / 576, "index": 132 * 8 / 128},
    "fp4": {"full": 4, "window": 4, "mla": 352 * 8 / 576, "index": 132 * 8 / 128},
}
"""Bits per cached number by kind of cache group, 16 where nothing is said. Latent (512 + 64 numbers) and
index keys (128) in the layouts fp8_ds_mla, nvfp4_ds_mla: 656, 352 and 132 bytes per position and layer."""

PARALLEL = {
    "tp": "tensor parallel: every device has a share of every layer; all-reduces per layer",
    "pp": "pipeline: a token passes the devices one after the other; speed of one device, memory of all",
    "replicas": "every device has the whole model and its share of the requests",
}


@dataclass(frozen=True)
class Hardware:
    """One device; None and missing rates are unknown. Units: 1e9 bytes, 1e9 bytes/s, 1e12 operations/s."""

    name: str
    title: str
    bandwidth_gb_s: float
    kind: str = "other"
    memory_gb: float | None = None
    tflops: Mapping[str, float] = field(default_factory=dict)
    link_gb_s: float | None = None
    source: str = "given on the command line"
    date: str = ""


@dataclass(frozen=True)
class Setup:
    """What the claim is about. precision None = the bits of the model's own file.

    batch: requests at once; context: cached positions that a new token sees, itself included. drafts: rows
    verified beside the first one; tokens_per_step: committed per step, in the mean; step_cost: a speculative
    step over a plain one, None = counted. collective_us: latency of one collective, 0 = free (the bound).
    """

    model: ClaimModel
    hardware: Hardware
    precision: str | None
    kv: str = "bf16"
    devices: int = 1
    parallel: str = "tp"
    batch: int = 1
    context: float = 1.0
    drafts: int = 0
    tokens_per_step: float = 1.0
    step_cost: float | None = None
    own_draft: bool = True
    collective_us: float = 0.0


@dataclass(frozen=True)
class Step:
    """One step of all requests together. Bytes by part; seconds of each bound (None = rate unknown)."""

    weights: Mapping[str, float]
    kv_bytes: float
    flops: float
    memory_s: float
    compute_s: float | None
    link_s: float | None
    collectives: int
    latency_s: float

    @property
    def total_bytes(self) -> float:
        return sum(self.weights.values()) + self.kv_bytes

    @property
    def seconds(self) -> float:
        return max(self.memory_s, self.compute_s or 0.0, self.link_s or 0.0) + self.latency_s

    @property
    def bound(self) -> str:
        """Which of the overlapping parts is the longest."""
        parts = {"memory": self.memory_s, "compute": self.compute_s or 0.0, "link": self.link_s or 0.0}
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class Ceiling:
    """The fastest that a setup can be. step_s: of the steps as run, with speculation where there is some.

    per_request: tok/s of one request; total: of all; hard: of one request if all tokens of a step chose the
    same experts. step_cost: a speculative step over a plain one, as given or as counted. footprint: bytes of
    all weights, and of the caches of all requests; fits None = unknown.
    """

    plain: Step
    verify: Step
    draft: Step | None
    step_s: float
    step_cost: float
    per_request: float
    total: float
    hard: float
    weight_footprint: float
    kv_footprint: float
    fits: bool | None


def ceiling(setup: Setup) -> Ceiling:
    """The bound of a setup. ConfigError where it contradicts itself or the model can't be cut so."""
    _check(setup)
    plain = count_step(setup, "main", 1, shared=False)
    verify, draft, step_s = _speculative(setup, plain, shared=False)
    hard_s = _speculative(setup, count_step(setup, "main", 1, shared=True), shared=True)[2]
    per_request = setup.tokens_per_step / step_s
    weights, kv = footprint(setup)
    memory = setup.hardware.memory_gb
    copies = setup.devices if setup.parallel == "replicas" else 1
    return Ceiling(
        plain=plain,
        verify=verify,
        draft=draft,
        step_s=step_s,
        step_cost=setup.step_cost or step_s / plain.seconds,
        per_request=per_request,
        total=per_request * setup.batch,
        hard=setup.tokens_per_step / hard_s,
        weight_footprint=weights,
        kv_footprint=kv,
        fits=None if memory is None else weights * copies + kv <= memory * 1e9 * setup.devices,
    )


def _speculative(setup: Setup, plain: Step, *, shared: bool) -> tuple[Step, Step | None, float]:
    """(verification, one pass of the draft layer, seconds of a whole step)."""
    if not setup.drafts:
        return plain, None, plain.seconds
    verify = count_step(setup, "main", 1 + setup.drafts, shared=shared)
    draft = None
    if setup.own_draft and "draft" in setup.model.plans:
        draft = count_step(setup, "draft", 1, shared=shared)
    counted = verify.seconds + setup.drafts * (draft.seconds if draft is not None else 0.0)
    return verify, draft, max(counted, plain.seconds * (setup.step_cost or 1.0))


def _check(setup: Setup) -> None:
    model = setup.model
    if setup.precision is None and model.bits is None:
        raise ConfigError(
            f"{model.name} has no weights that say their precision: name one of {', '.join(PRECISIONS)}"
        )
    for value, known, what in (
        (setup.precision, PRECISIONS, "precision"), (setup.kv, KV_BITS, "KV format"),
        (setup.parallel, PARALLEL, "parallelism"),
    ):  # fmt: skip
        if value is not None and value not in known:
            raise ConfigError(f"{what} {value!r} is not known; supported: {', '.join(known)}")
    limit = model.max_context or model.config.context_length
    if setup.context > limit:
        why = f": {model.note}" if model.max_context else ""
        raise ConfigError(f"context {setup.context:g}: {model.name} is counted up to {limit}{why}")
    if setup.tokens_per_step > 1 and not setup.drafts:
        raise ConfigError(
            f"{setup.tokens_per_step:g} tokens per step need drafts (rows verified beside the first)"
        )
    if setup.tokens_per_step > setup.drafts + 1:
        raise ConfigError(
            f"{setup.tokens_per_step:g} tokens per step: {setup.drafts} drafts give {setup.drafts + 1}"
        )
    if setup.step_cost is not None and not setup.drafts:
        raise ConfigError("a step cost is the ratio of a speculative step to a plain one: it needs drafts")


# ---------------------------------------------------------------- one step


def count_step(setup: Setup, plan_name: str, rows: int, *, shared: bool) -> Step:
    """A step of `rows` tokens for every request. shared: all tokens choose the same experts."""
    plan = setup.model.plans[plan_name]
    workers = setup.devices if setup.parallel == "tp" else 1
    requests = setup.batch if setup.parallel == "tp" else math.ceil(setup.batch / setup.devices)
    tokens = requests * rows
    bits, kv_bits = slot_bits(setup), KV_BITS[setup.kv]
    context = setup.context + (rows - 1) / 2
    weights: dict[str, float] = {}
    kv = operations = 0.0
    for op in plan.ops:
        moved = op_bytes(op, plan, tokens, requests, context, bits, kv_bits, shared)
        part = PARTS.get(type(op), "other")
        weights[part] = weights.get(part, 0.0) + moved.weights
        kv += moved.kv
        operations += flops(op, plan, tokens, requests, tokens, context)
    hardware, latency = setup.hardware, setup.collective_us / 1e6
    rate = compute_rate(setup)
    collectives = all_reduces(plan, workers) if workers > 1 else 0
    if setup.parallel == "pp":
        latency *= setup.devices - 1  # hand-overs, one per pair of neighbours
    payload = collectives * tokens * setup.model.config.hidden_size * ACTIVATION_BYTES
    return Step(
        weights={part: value for part, value in weights.items() if value},
        kv_bytes=kv,
        flops=operations,
        memory_s=(sum(weights.values()) + kv) / (hardware.bandwidth_gb_s * 1e9 * workers),
        compute_s=None if rate is None else operations / (rate[1] * 1e12 * workers),
        link_s=None if hardware.link_gb_s is None else payload / (hardware.link_gb_s * 1e9),
        collectives=collectives,
        latency_s=latency if setup.parallel == "pp" else collectives * latency,
    )


PARTS: Mapping[type[ops.Op], str] = {
    ops.Linear: "matrices",
    ops.HeadLinear: "matrices",
    ops.MoeLinear: "routed experts",
    ops.LmHead: "head",
    ops.Embed: "embedding",
}
"""Op -> what its weights are called in a report."""


def op_bytes(
    op: ops.Op, plan: Plan, tokens: int, requests: int, context: float,
    bits: Mapping[str, float], kv_bits: Mapping[str, float], shared: bool,
) -> Traffic:  # fmt: skip
    """Least bytes of one op, by plan/costs.py. Caches count in the bits of their kind."""
    group = getattr(op, "group", None)
    kv_bytes = kv_bits.get(plan.groups[group].kind, 16.0) / 8 if group is not None else 2.0
    few = shared and isinstance(op, ops.MoeLinear)
    return bytes_moved(
        op, plan, 1 if few else tokens, 1 if few else requests, tokens, context,
        weight_bits=bits, kv_bytes=kv_bytes,
    )  # fmt: skip


def slot_bits(setup: Setup) -> Mapping[str, float]:
    """Bits per weight of every slot: the precision's, or the file's own."""
    if setup.precision is None:
        assert setup.model.bits is not None
        return setup.model.bits
    return precision_bits(setup.precision, tuple(setup.model.plans.values()))


def precision_bits(precision: str, plans: tuple[Plan, ...]) -> Mapping[str, float]:
    """Experts and matrices as the precision says; routers, index weights, the draft's joint, heads,
    embeddings, norms and biases in 16 bits, as the published checkpoints keep them."""
    row = PRECISIONS[precision]
    bits: dict[str, float] = {}
    for plan in plans:
        bits.update(dict.fromkeys(plan.slots, row.other))
        for op in plan.ops:
            if isinstance(op, ops.MoeLinear):
                bits.update(dict.fromkeys(op.weights, row.experts))
            elif isinstance(op, (ops.Linear, ops.HeadLinear)):
                for slot in op.names("slots"):
                    if len(plan.slots[slot].shape) > 1 and not any(part in slot for part in KEPT):
                        bits[slot] = row.matrices
    return bits


KEPT = (".router", ".index_weights", ".eh_proj")
"""Matrices that quantised checkpoints of these families leave in bf16."""


def compute_rate(setup: Setup) -> tuple[str, float] | None:
    """(arithmetic, 1e12 operations/s of one device); None = the table doesn't know. A file of its own bits
    may use the fastest arithmetic there is."""
    rates = setup.hardware.tflops
    if setup.precision is None:
        return max(rates.items(), key=lambda item: item[1], default=None)
    return next(((name, rates[name]) for name in PRECISIONS[setup.precision].compute if name in rates), None)


def all_reduces(plan: Plan, workers: int) -> int:
    """Collectives of a step when the plan is cut for so many devices (plan/shard.py)."""
    return _collectives(_Key(plan), workers)


@dataclass(frozen=True, eq=False)
class _Key:
    """A plan as a dictionary key: by identity, since plans hold mappings."""

    plan: Plan

    def __hash__(self) -> int:
        return id(self.plan)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other.plan is self.plan


@lru_cache(maxsize=64)
def _collectives(key: _Key, workers: int) -> int:
    try:
        cut = shard(key.plan, 0, workers)
    except PlanError as error:
        raise ConfigError(f"tensor parallel over {workers} devices: {error}") from None
    return sum(isinstance(op, (ops.AllReduce, ops.AllGather)) for op in cut.ops)


def footprint(setup: Setup) -> tuple[float, float]:
    """(bytes of all weights once, bytes of the caches of all requests)."""
    bits = slot_bits(setup)
    sizes: dict[str, float] = {}
    for plan in setup.model.plans.values():
        for name, slot in plan.slots.items():
            shares = slot.fallback is not None and (setup.model.config.tied_head or name.startswith("draft."))
            sizes[name] = 0.0 if shares else math.prod(slot.shape) * bits[name] / 8
    cached = 0.0
    for group in setup.model.plans["main"].groups.values():
        width = group.key_dim + group.value_dim
        heads = group.num_heads if group.kind in ("full", "window") else 1
        cached += group.num_layers * heads * width * KV_BITS[setup.kv].get(group.kind, 16.0) / 8
    return sum(sizes.values()), cached * setup.context * setup.batch


# ---------------------------------------------------------------- a claim against its ceiling


@dataclass(frozen=True)
class Verdict:
    """A claim against a ceiling; share = claim / ceiling. Times and plain_speed are what the claim asks for.

    possible: 'impossible' above the hard limit, 'does not fit' the memory, 'only with shared experts' above
    the ceiling, else 'not excluded'.
    """

    claim: float
    possible: str
    share: float
    step_us: float
    plain_step_us: float
    layer_us: float
    plain_speed: float
    needs: tuple[str, ...]


def judge(setup: Setup, bound: Ceiling, claim: float, base_speed: float | None = None) -> Verdict:
    """What `claim` tok/s of one request ask for. base_speed: measured tok/s without speculation."""
    share = claim / bound.per_request
    possible = "does not fit" if bound.fits is False else "not excluded"
    if claim > bound.hard:
        possible = "impossible"
    elif share > 1 and bound.fits is not False:
        possible = "only with shared experts"
    allowed = setup.tokens_per_step / claim
    plain = allowed / bound.step_cost
    layers = setup.model.config.num_layers
    return Verdict(
        claim, possible, share, allowed * 1e6, plain * 1e6, plain * 1e6 / layers, 1 / plain,
        tuple(_needs(setup, bound, claim, base_speed)),
    )  # fmt: skip


def _needs(setup: Setup, bound: Ceiling, claim: float, base_speed: float | None) -> list[str]:
    """What would have to be true, one sentence each."""
    layers, hardware = setup.model.config.num_layers, setup.hardware
    allowed = setup.tokens_per_step / claim
    plain = allowed / bound.step_cost
    needs = [
        f"a plain step in {plain * 1e6:,.0f} microseconds, {plain * 1e6 / layers:.0f} microseconds per "
        f"layer: {1 / plain:.0f} tok/s without speculation"
    ]
    if setup.drafts:
        given = "as given" if setup.step_cost is not None else "as at the ceiling"
        needs.append(
            f"{setup.tokens_per_step:g} tokens per step from {setup.drafts} drafts, a step costing "
            f"{bound.step_cost:.2f} plain ones ({given})"
        )
    if base_speed is not None:
        wanted = claim * bound.step_cost / base_speed
        needs.append(
            f"from a base of {base_speed:g} tok/s without speculation: at least {wanted:.1f} tokens per step"
            + ("" if setup.drafts else " (with steps that cost no more than plain ones)")
        )
    read = bound.plain.total_bytes / plain / 1e9
    workers = setup.devices if setup.parallel == "tp" else 1
    needs.append(
        f"{read:,.0f} GB/s read while a plain step runs, {read / hardware.bandwidth_gb_s / workers:.0%} "
        f"of the peak of {workers} device{'s' * (workers > 1)}"
    )
    if bound.fits is False:
        needs.append("more memory: weights and caches do not fit these devices")
    fewest = fewest_devices(setup)
    if fewest is not None:
        needs.append(f"at least {fewest} device{'s' * (fewest > 1)} to hold weights and caches")
    if bound.plain.collectives and bound.step_s < allowed:
        count = bound.verify.collectives + setup.drafts * (bound.draft.collectives if bound.draft else 0)
        spare = (allowed - bound.step_s) / count * 1e6
        needs.append(
            f"{count} collectives per step, each done in {spare:.1f} microseconds if all else took no longer "
            "than the floor"
        )
    return needs


def fewest_devices(setup: Setup) -> int | None:
    """Devices whose memory holds weights and caches; None = memory unknown, or nothing is shared out."""
    if setup.hardware.memory_gb is None or setup.parallel == "replicas":
        return None
    return max(1, math.ceil(sum(footprint(setup)) / (setup.hardware.memory_gb * 1e9)))


def describe(value: Step) -> dict[str, Any]:
    """A step as plain JSON values, with what is derived from it."""
    return {
        "weights_bytes": dict(value.weights),
        "kv_bytes": value.kv_bytes,
        "total_bytes": value.total_bytes,
        "flops": value.flops,
        "memory_s": value.memory_s,
        "compute_s": value.compute_s,
        "link_s": value.link_s,
        "collectives": value.collectives,
        "latency_s": value.latency_s,
        "seconds": value.seconds,
        "bound": value.bound,
    }
