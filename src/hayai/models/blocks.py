"""Wiring that model families share: slots with their names per container, and blocks of ops.

Every function appends ops to a `PlanBuilder` and returns the buffer its result is in. Buffers are reused
from layer to layer; the residual stream `hidden` is updated in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hayai.config import ModelConfig, RopeConfig
from hayai.plan import ops
from hayai.plan.builder import PlanBuilder
from hayai.plan.plan import Transform, WeightSlot

HIDDEN = "hidden"

Sources = Mapping[str, tuple[str, ...]]
"""Container -> tensor names, as in WeightSlot."""


@dataclass(frozen=True)
class Names:
    """Tensor names of one layer: what stands before the part's own name, per container."""

    gguf: str
    hf: str

    def of(self, gguf: str, hf: str) -> Sources:
        return {"gguf": (self.gguf + gguf,), "hf": (self.hf + hf,)}


def layer_names(layer: int) -> Names:
    return Names(f"blk.{layer}.", f"model.layers.{layer}.")


def slot(
    plan: PlanBuilder,
    name: str,
    shape: tuple[int, ...],
    sources: Sources,
    *transforms: Transform,
    shard: str | None = None,
    fallback: str | None = None,
    optional: bool = False,
) -> str:
    """Declare a weight slot; see WeightSlot for the fields."""
    return plan.slot(WeightSlot(name, shape, sources, transforms, optional, fallback, shard))


def embed(plan: PlanBuilder, config: ModelConfig) -> str:
    """Token embedding into the residual stream."""
    hidden = plan.buffer(HIDDEN, "T", config.hidden_size)
    plan.add(ops.Embed("tokens", embed_slot(plan, config), hidden))
    return hidden


def embed_slot(plan: PlanBuilder, config: ModelConfig) -> str:
    sources = {"gguf": ("token_embd.weight",), "hf": ("model.embed_tokens.weight",)}
    return slot(plan, "embed", (config.vocab_size, config.hidden_size), sources)


def head_slot(plan: PlanBuilder, config: ModelConfig) -> str:
    """The output matrix; a file without one ties it to the embedding table."""
    sources = {"gguf": ("output.weight",), "hf": ("lm_head.weight",)}
    shape = (config.vocab_size, config.hidden_size)
    fallback = embed_slot(plan, config)
    return slot(plan, "lm_head", shape, sources, shard="rows", fallback=fallback)


def norm(
    plan: PlanBuilder,
    x: str,
    out: str,
    name: str,
    sources: Sources,
    eps: float,
) -> str:
    """RMS norm of a whole row into `out` (declared with the shape of x)."""
    shape = plan.buffers[x].shape
    width = shape[-1]
    assert isinstance(width, int)
    weight = slot(plan, name, (width,), sources)
    plan.add(ops.RmsNorm(x, weight, plan.buffer(out, *shape), eps))
    return out


def rope_scaling(plan: PlanBuilder, rope: RopeConfig, rotary_dim: int) -> ops.RopeScaling | None:
    """The scaling that a config asks for; 'factors' reads the divisors from the file."""
    if rope.scaling_kind is None:
        return None
    factors = None
    if rope.scaling_kind == "factors":
        sources = {"gguf": ("rope_freqs.weight",), "hf": ("rope_freqs.weight",)}
        factors = slot(plan, "rope_factors", (rotary_dim // 2,), sources)
    return ops.RopeScaling(
        rope.scaling_kind,
        rope.factor,
        rope.low_freq_factor,
        rope.high_freq_factor,
        rope.original_context,
        factors,
    )


def gqa_attention(plan: PlanBuilder, config: ModelConfig, names: Names, prefix: str, layer: int) -> str:
    """Grouped-query attention of the normed rows: q, k, v, rope, cache, attention, output matrix."""
    hidden, heads, kv_heads, dim = (
        config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    )  # fmt: skip
    weights, biases, outs = [], [], []
    for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        sources = names.of(f"attn_{part}.weight", f"self_attn.{part}_proj.weight")
        weights.append(slot(plan, f"{prefix}.{part}", (count * dim, hidden), sources, shard="rows"))
        if config.attention_bias:
            sources = names.of(f"attn_{part}.bias", f"self_attn.{part}_proj.bias")
            biases.append(slot(plan, f"{prefix}.{part}_bias", (count * dim,), sources, shard="rows"))
        outs.append(plan.buffer(part, "T", count * dim))
    q, k, v = outs
    plan.add(ops.Linear("normed", tuple(weights), tuple(outs), tuple(biases)))
    rotary = config.rope.rotary_dim or dim
    scaling = rope_scaling(plan, config.rope, rotary)
    for x in (q, k):
        plan.add(
            ops.Rope(x, "positions", x, dim, rotary, config.rope.theta, config.rope.interleaved, 0, scaling)
        )
    plan.add(ops.KvAppend(k, v, "kv", layer))
    attended = plan.buffer("attended", "T", heads * dim)
    plan.add(ops.Attention(q, attended, "kv", layer, heads, kv_heads, dim, dim, dim**-0.5))
    sources = names.of("attn_output.weight", "self_attn.o_proj.weight")
    weight = slot(plan, f"{prefix}.o", (hidden, heads * dim), sources, shard="columns")
    out = plan.buffer("attention_out", "T", hidden)
    plan.add(ops.Linear(attended, (weight,), (out,)))
    return out


def mlp(
    plan: PlanBuilder,
    config: ModelConfig,
    prefix: str,
    sources: Mapping[str, Sources],
    size: int,
    tag: str = "",
) -> str:
    """Gated MLP of the normed rows. `sources`: of 'gate', 'up' and 'down'; `tag` tells buffers apart."""
    hidden = config.hidden_size
    gate, up, mixed = (plan.buffer(f"{tag}{part}", "T", size) for part in ("gate", "up", "mixed"))
    pair = tuple(
        slot(plan, f"{prefix}.{part}", (size, hidden), sources[part], shard="rows") for part in ("gate", "up")
    )
    plan.add(ops.Linear("normed", pair, (gate, up)))
    plan.add(ops.Glu(gate, up, mixed, config.act))
    down = slot(plan, f"{prefix}.down", (hidden, size), sources["down"], shard="columns")
    out = plan.buffer(f"{tag}ffn_out", "T", hidden)
    plan.add(ops.Linear(mixed, (down,), (out,)))
    return out


def mlp_sources(names: Names) -> dict[str, Sources]:
    return {
        part: names.of(f"ffn_{part}.weight", f"mlp.{part}_proj.weight") for part in ("gate", "up", "down")
    }


def moe(plan: PlanBuilder, config: ModelConfig, names: Names, prefix: str) -> str:
    """Routed experts and the shared expert of the normed rows (names of the HF container)."""
    hidden, experts, top_k, size = (
        config.hidden_size, config.num_experts, config.experts_per_token, config.moe_ffn_size
    )  # fmt: skip
    router = slot(plan, f"{prefix}.router", (experts, hidden), {"hf": (names.hf + "mlp.gate.weight",)})
    scores = plan.buffer("router_logits", "T", experts)
    plan.add(ops.Linear("normed", (router,), (scores,)))
    sources = {"hf": (names.hf + "mlp.gate.e_score_correction_bias",)}
    bias = slot(plan, f"{prefix}.router_bias", (experts,), sources)
    ids = plan.buffer("expert_ids", "T", top_k, dtype="i32")
    weights = plan.buffer("expert_weights", "T", top_k)
    plan.add(
        ops.Route(
            scores, ids, weights, top_k, config.router_score, bias, config.expert_groups,
            config.expert_top_groups, config.router_normalize, config.router_scaling,
        )
    )  # fmt: skip

    def stacked(part: str, rows: int, columns: int, cut: str) -> str:
        tensors = tuple(f"{names.hf}mlp.experts.{e}.{part}_proj.weight" for e in range(experts))
        shape = (experts, rows, columns)
        return slot(plan, f"{prefix}.experts.{part}", shape, {"hf": tensors}, Transform("stack"), shard=cut)

    pair = (stacked("gate", size, hidden, "rows"), stacked("up", size, hidden, "rows"))
    gate, up, mixed = (plan.buffer(f"expert_{part}", "T", top_k, size) for part in ("gate", "up", "mixed"))
    plan.add(ops.MoeLinear("normed", ids, pair, (gate, up)))
    plan.add(ops.Glu(gate, up, mixed, config.act))
    each = plan.buffer("expert_out", "T", top_k, hidden)
    down = stacked("down", hidden, size, "columns")
    plan.add(ops.MoeLinear(mixed, ids, (down,), (each,), per_expert=True))
    out = plan.buffer("ffn_out", "T", hidden)
    plan.add(ops.MoeCombine(each, weights, out))
    if config.num_shared_experts:
        parts = ("gate", "up", "down")
        shared = {part: {"hf": (f"{names.hf}mlp.shared_experts.{part}_proj.weight",)} for part in parts}
        width = size * config.num_shared_experts
        plan.add(ops.Add(out, mlp(plan, config, f"{prefix}.shared", shared, width, "shared_"), out))
    return out


def head(
    plan: PlanBuilder, config: ModelConfig, x: str, *, normed: bool = False, weight: str | None = None
) -> None:
    """Wanted rows -> norm -> logits -> sampled tokens; buffers `logits` and `sampled`.

    The norm comes after the gather, so that only wanted rows pay for it; `normed`: x has had it already.
    """
    rows = plan.buffer("rows", "R", config.hidden_size)
    plan.add(ops.GatherRows(x, "logit_rows", rows))
    if not normed:
        rows = norm(plan, rows, "rows_normed", "final_norm", final_norm_sources(), config.norm_eps)
    logits = plan.buffer("logits", "R", config.vocab_size)
    plan.add(ops.LmHead(rows, weight or head_slot(plan, config), logits))
    plan.add(ops.Sample(logits, plan.buffer("sampled", "R", dtype="i32")))


def final_norm_sources() -> Sources:
    return {"gguf": ("output_norm.weight",), "hf": ("model.norm.weight",)}
