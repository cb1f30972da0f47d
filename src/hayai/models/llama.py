"""The Llama family: pre-norm decoder with grouped-query attention and a gated MLP.

Covers whatever its config says of rope (pairing, partial, scaling), q/k/v biases and a tied head:
Llama 2 and 3, SmolLM2, Mistral, and others of the same wiring.
"""

from __future__ import annotations

from hayai.config import ModelConfig
from hayai.models import blocks
from hayai.plan import ops
from hayai.plan.builder import PlanBuilder
from hayai.plan.plan import CacheGroup, Plan


def build(config: ModelConfig) -> dict[str, Plan]:
    """Plan 'main': rows of hidden_size, one cache group 'kv' of kind full."""
    plan = PlanBuilder("main")
    dim = config.head_dim
    plan.group(CacheGroup("kv", "full", config.num_layers, config.num_kv_heads, dim, dim))
    hidden = blocks.embed(plan, config)
    for layer in range(config.num_layers):
        _layer(plan, config, layer, hidden)
    blocks.head(plan, config, hidden)
    return {"main": plan.build("sampled")}


def _layer(plan: PlanBuilder, config: ModelConfig, layer: int, hidden: str) -> None:
    names, prefix, eps = blocks.layer_names(layer), f"layers.{layer}", config.norm_eps
    sources = names.of("attn_norm.weight", "input_layernorm.weight")
    blocks.norm(plan, hidden, "normed", f"{prefix}.attn_norm", sources, eps)
    attention = blocks.gqa_attention(plan, config, names, prefix, layer)
    plan.add(ops.Add(hidden, attention, hidden))
    sources = names.of("ffn_norm.weight", "post_attention_layernorm.weight")
    blocks.norm(plan, hidden, "normed", f"{prefix}.ffn_norm", sources, eps)
    ffn = blocks.mlp(plan, config, prefix, blocks.mlp_sources(names), config.ffn_size)
    plan.add(ops.Add(hidden, ffn, hidden))
