"""GLM-5 and 5.1: latent attention (MLA, run absorbed) with a sparse index, experts, a draft layer.

Also GLM-4.7-Flash, which is the same without the index (`index_topk` 0). Every split of a matrix (nope and
rope rows of a head, latent and rope rows of kv_a, the two halves of kv_b and of eh_proj) is a slot of its
own with a transform, so that no op has to slice. Names are those of the Hugging Face checkpoints.

Plan 'draft' is the multi-token prediction layer: for a token at position i + 1 and the main model's hidden
row of position i (after its final norm) it predicts the token at i + 2. It is run after each main step on the
same rows, with token ids shifted left by one and the positions of the main step; hidden rows come from the
carry buffer `draft_hidden` by `carry_rows`. It leaves its own normed rows there, so that drafting again is
the same plan on its own output. It shares slots and cache groups with 'main', whose last layer it is.

Sources: DeepSeek-V3 (arXiv 2412.19437) for MLA, routing and the draft layer; DeepSeek-V3.2 for the index;
zai-org's GLM-5 checkpoint layout.
"""

from __future__ import annotations

from hayai.config import ModelConfig
from hayai.errors import ModelError
from hayai.models import blocks
from hayai.plan import ops
from hayai.plan.builder import PlanBuilder
from hayai.plan.plan import CacheGroup, Plan, Transform

INDEX_NORM_EPS = 1e-6
"""Of the layer norm on index keys, whatever the model's own eps."""

CARRY = "draft_hidden"


def build(config: ModelConfig) -> dict[str, Plan]:
    """Plans 'main' and, where the model has a draft layer, 'draft'.

    Cache groups: 'mla' (latent after its norm, rope part), and 'index' for sparse attention.
    """
    if config.num_draft_layers > 1:
        raise ModelError(f"{config.num_draft_layers} draft layers; supported: none or one")
    plans = {"main": _main(config)}
    if config.num_draft_layers:
        plans["draft"] = _draft(config)
    return plans


def _start(name: str, config: ModelConfig) -> PlanBuilder:
    plan = PlanBuilder(name)
    layers = config.num_layers + config.num_draft_layers
    plan.group(
        CacheGroup("mla", "mla", layers, 1, config.kv_lora_rank, config.qk_rope_dim, sharded="replicated")
    )
    if config.index_topk:
        plan.group(CacheGroup("index", "index", layers, 1, config.index_head_dim, 0, sharded="replicated"))
    return plan


def _main(config: ModelConfig) -> Plan:
    plan = _start("main", config)
    hidden = blocks.embed(plan, config)
    for layer in range(config.num_layers):
        _layer(plan, config, layer, hidden, dense=layer < config.num_dense_layers)
    if not config.num_draft_layers:
        blocks.head(plan, config, hidden)
        return plan.build("sampled")
    sources = blocks.final_norm_sources()
    final = blocks.norm(plan, hidden, "final", "final_norm", sources, config.norm_eps)
    plan.add(ops.Copy(final, plan.buffer(CARRY, "T", config.hidden_size, carry=True)))
    blocks.head(plan, config, final, normed=True)
    return plan.build("sampled")


def _draft(config: ModelConfig) -> Plan:
    plan = _start("draft", config)
    width, vocab, eps = config.hidden_size, config.vocab_size, config.norm_eps
    name = blocks.layer_names(config.num_layers).hf
    table = blocks.slot(
        plan, "draft.embed", (vocab, width), {"hf": (name + "embed_tokens.weight",)},
        fallback=blocks.embed_slot(plan, config),
    )  # fmt: skip
    embedded, previous = plan.buffer("embedded", "T", width), plan.buffer("previous", "T", width)
    plan.add(ops.Embed("tokens", table, embedded))
    carry = plan.buffer(CARRY, "T", width, carry=True)
    plan.add(ops.GatherRows(carry, plan.input("carry_rows"), previous))
    hidden = plan.buffer(blocks.HIDDEN, "T", width)
    projected = plan.buffer("projected", "T", width)
    # eh_proj takes [embedding ; hidden]: the sum of its two column halves, each on its own input.
    for half, (x, norm, out) in enumerate(((embedded, "enorm", hidden), (previous, "hnorm", projected))):
        normed = blocks.norm(plan, x, f"{x}_normed", f"draft.{norm}", {"hf": (f"{name}{norm}.weight",)}, eps)
        columns = Transform("columns", half * width, (half + 1) * width)
        sources = {"hf": (name + "eh_proj.weight",)}
        weight = blocks.slot(plan, f"draft.eh_proj.{half}", (width, width), sources, columns)
        plan.add(ops.Linear(normed, (weight,), (out,)))
    plan.add(ops.Add(hidden, projected, hidden))
    _layer(plan, config, config.num_layers, hidden, dense=False)
    sources = {"hf": (name + "shared_head.norm.weight",)}
    final = blocks.norm(plan, hidden, "final", "draft.final_norm", sources, eps)
    plan.add(ops.Copy(final, carry))
    head = blocks.slot(
        plan, "draft.lm_head", (vocab, width), {"hf": (name + "shared_head.head.weight",)},
        shard="rows", fallback=blocks.head_slot(plan, config),
    )  # fmt: skip
    blocks.head(plan, config, final, normed=True, weight=head)
    return plan.build("sampled")


def _layer(plan: PlanBuilder, config: ModelConfig, layer: int, hidden: str, dense: bool) -> None:
    names, prefix, eps = blocks.layer_names(layer), f"layers.{layer}", config.norm_eps
    sources = {"hf": (names.hf + "input_layernorm.weight",)}
    blocks.norm(plan, hidden, "normed", f"{prefix}.attn_norm", sources, eps)
    plan.add(ops.Add(hidden, _attention(plan, config, names.hf + "self_attn.", prefix, layer), hidden))
    sources = {"hf": (names.hf + "post_attention_layernorm.weight",)}
    blocks.norm(plan, hidden, "normed", f"{prefix}.ffn_norm", sources, eps)
    if dense:
        ffn = blocks.mlp(plan, config, prefix, blocks.mlp_sources(names), config.ffn_size)
    else:
        ffn = blocks.moe(plan, config, names, prefix)
    plan.add(ops.Add(hidden, ffn, hidden))


def _attention(plan: PlanBuilder, config: ModelConfig, source: str, prefix: str, layer: int) -> str:
    """Absorbed MLA: queries are taken into the latent space, where all heads read one key per position."""
    heads, latent, nope, rope, value = (
        config.num_heads, config.kv_lora_rank, config.qk_nope_dim, config.qk_rope_dim, config.value_dim
    )  # fmt: skip
    _down(plan, config, source, prefix)
    q_rows = nope + rope
    parts = (("q_nope", 0, nope), ("q_rope", nope, q_rows))
    weights = tuple(
        blocks.slot(
            plan, f"{prefix}.{part}", (heads * (stop - start), config.q_lora_rank),
            {"hf": (source + "q_b_proj.weight",)}, Transform("rows", start, stop, q_rows), shard="rows",
        )
        for part, start, stop in parts
    )  # fmt: skip
    outs = tuple(plan.buffer(part, "T", heads * (stop - start)) for part, start, stop in parts)
    plan.add(ops.Linear("q_normed", weights, outs))
    for x in ("q_rope", "k_rope"):
        plan.add(_rope(config, x, rope))
    plan.add(ops.KvAppend("latent_normed", "k_rope", "mla", layer))
    select = _index(plan, config, source, prefix, layer) if config.index_topk else None

    def absorbed(name: str, shape: tuple[int, ...], start: int, stop: int, kind: str) -> str:
        cut = (Transform("rows", start, stop, nope + value), Transform(kind, heads=heads))
        sources = {"hf": (source + "kv_b_proj.weight",)}
        return blocks.slot(plan, f"{prefix}.{name}", (heads, *shape), sources, *cut, shard="heads")

    query = plan.buffer("q_latent", "T", heads * latent)
    plan.add(ops.HeadLinear("q_nope", absorbed("k_up", (latent, nope), 0, nope, "heads_t"), query, heads))
    mixed = plan.buffer("mixed_latent", "T", heads * latent)
    scale = float((nope + rope) ** -0.5)
    plan.add(
        ops.Attention(
            query, mixed, "mla", layer, heads, 1, latent, latent, scale, q_rope="q_rope", select=select
        )
    )
    attended = plan.buffer("attended", "T", heads * value)
    v_up = absorbed("v_up", (value, latent), nope, nope + value, "heads")
    plan.add(ops.HeadLinear(mixed, v_up, attended, heads))
    sources = {"hf": (source + "o_proj.weight",)}
    weight = blocks.slot(plan, f"{prefix}.o", (config.hidden_size, heads * value), sources, shard="columns")
    out = plan.buffer("attention_out", "T", config.hidden_size)
    plan.add(ops.Linear(attended, (weight,), (out,)))
    return out


def _rope(config: ModelConfig, x: str, head_dim: int) -> ops.Rope:
    """Rotates the first qk_rope_dim dims of every head of x in place."""
    rope = config.rope
    return ops.Rope(x, "positions", x, head_dim, config.qk_rope_dim, rope.theta, rope.interleaved)


def _down(plan: PlanBuilder, config: ModelConfig, source: str, prefix: str) -> None:
    """The matrices that read the layer's input, as one group, and the norms of the two latents."""
    latent, rope, hidden = config.kv_lora_rank, config.qk_rope_dim, config.hidden_size
    kv_a = (source + "kv_a_proj_with_mqa.weight",)
    rows: list[tuple[str, int, tuple[str, ...], tuple[Transform, ...]]] = [
        ("q_down", config.q_lora_rank, (source + "q_a_proj.weight",), ()),
        ("latent", latent, kv_a, (Transform("rows", 0, latent),)),
        ("k_rope", rope, kv_a, (Transform("rows", latent, latent + rope),)),
    ]
    if config.index_topk:
        index = source + "indexer."
        rows += [
            ("index_k", config.index_head_dim, (index + "wk.weight",), ()),
            ("index_weights", config.index_heads, (index + "weights_proj.weight",), ()),
        ]
    weights = tuple(
        blocks.slot(plan, f"{prefix}.{name}", (count, hidden), {"hf": tensors}, *transforms)
        for name, count, tensors, transforms in rows
    )
    outs = tuple(plan.buffer(name, "T", count) for name, count, _, _ in rows)
    plan.add(ops.Linear("normed", weights, outs))
    for x, out, name in (("q_down", "q_normed", "q_a"), ("latent", "latent_normed", "kv_a")):
        sources = {"hf": (f"{source}{name}_layernorm.weight",)}
        blocks.norm(plan, x, out, f"{prefix}.{name}_norm", sources, config.norm_eps)


def _index(plan: PlanBuilder, config: ModelConfig, source: str, prefix: str, layer: int) -> str:
    """The lightning indexer: stores this layer's index keys, returns the positions to attend to."""
    heads, dim, index = config.index_heads, config.index_head_dim, source + "indexer."
    query = plan.buffer("index_q", "T", heads * dim)
    sources = {"hf": (index + "wq_b.weight",)}
    weight = blocks.slot(plan, f"{prefix}.index_q", (heads * dim, config.q_lora_rank), sources)
    plan.add(ops.Linear("q_normed", (weight,), (query,)))
    gain, bias = (
        blocks.slot(plan, f"{prefix}.index_norm.{part}", (dim,), {"hf": (f"{index}k_norm.{part}",)})
        for part in ("weight", "bias")
    )
    key = plan.buffer("index_k_normed", "T", dim)
    plan.add(ops.LayerNorm("index_k", gain, bias, key, INDEX_NORM_EPS))
    for x in (query, key):
        plan.add(_rope(config, x, dim))
    plan.add(ops.KvAppend(key, None, "index", layer))
    plan.add(ops.Scale("index_weights", "index_weights", float(heads**-0.5)))
    select = plan.buffer("select", "T", config.index_topk, dtype="i32")
    plan.add(
        ops.IndexTopk(
            query, "index_weights", select, "index", layer, heads, dim, config.index_topk, float(dim**-0.5)
        )
    )
    return select
