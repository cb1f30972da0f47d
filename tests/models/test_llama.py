"""The Llama family on the reference backend, against a forward pass written on its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from hayai.config import ModelConfig
from hayai.errors import ModelError
from hayai.models.registry import SUPPORTED, build_plans
from tiny_models import LLAMA, Arrays, Sequences, compile_reference, llama_tensors

Doubles = NDArray[np.float64]


def rms(x: Doubles, weight: NDArray[np.float32], eps: float) -> Doubles:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def silu(x: Doubles) -> Doubles:
    return x / (1 + np.exp(-x))


def rotate(x: Doubles, freqs: Doubles, interleaved: bool) -> Doubles:
    """x (T, heads, dim): rotated as complex numbers."""
    angles = np.exp(1j * np.arange(len(x))[:, None] * freqs)[:, None]
    n = len(freqs)
    out = x.copy()
    if interleaved:
        turned = (x[..., 0 : 2 * n : 2] + 1j * x[..., 1 : 2 * n : 2]) * angles
        out[..., 0 : 2 * n : 2], out[..., 1 : 2 * n : 2] = turned.real, turned.imag
    else:
        turned = (x[..., :n] + 1j * x[..., n : 2 * n]) * angles
        out[..., :n], out[..., n : 2 * n] = turned.real, turned.imag
    return out


def forward(t: Arrays, c: ModelConfig, ids: list[int]) -> Doubles:
    """Logits (T, vocab) in float64, one sequence, no cache."""
    h = t["model.embed_tokens.weight"][ids].astype(np.float64)
    n = c.rope.rotary_dim
    freqs = c.rope.theta ** (-np.arange(0, n, 2) / n)
    if c.rope.scaling_kind == "factors":
        freqs = freqs / t["rope_freqs.weight"]
    future = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for layer in range(c.num_layers):
        name = f"model.layers.{layer}."
        x = rms(h, t[name + "input_layernorm.weight"], c.norm_eps)
        q, k, v = (
            (x @ t[f"{name}self_attn.{p}_proj.weight"].T + t.get(f"{name}self_attn.{p}_proj.bias", 0.0))
            .reshape(len(ids), -1, c.head_dim)
            for p in "qkv"
        )  # fmt: skip
        q, k = rotate(q, freqs, c.rope.interleaved), rotate(k, freqs, c.rope.interleaved)
        heads = []
        for head in range(c.num_heads):
            shared = head // (c.num_heads // c.num_kv_heads)
            s = q[:, head] @ k[:, shared].T / np.sqrt(c.head_dim) + future
            p = np.exp(s - s.max(-1, keepdims=True))
            heads.append(p / p.sum(-1, keepdims=True) @ v[:, shared])
        h = h + np.concatenate(heads, -1) @ t[name + "self_attn.o_proj.weight"].T
        x = rms(h, t[name + "post_attention_layernorm.weight"], c.norm_eps)
        gate, up, down = (t[f"{name}mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
        h = h + silu(x @ gate.T) * (x @ up.T) @ down.T
    h = rms(h, t["model.norm.weight"], c.norm_eps)
    return h @ t.get("lm_head.weight", t["model.embed_tokens.weight"]).T


VARIANTS = {
    "plain": LLAMA,
    "tied": replace(LLAMA, tied_head=True),
    "biases": replace(LLAMA, attention_bias=True),
    "interleaved": replace(LLAMA, rope=replace(LLAMA.rope, interleaved=True)),
    "partial rope": replace(LLAMA, rope=replace(LLAMA.rope, rotary_dim=8)),
    "rope factors": replace(LLAMA, rope=replace(LLAMA.rope, scaling_kind="factors")),
    "one kv head": replace(LLAMA, num_kv_heads=1),
    "head dim apart from hidden": replace(LLAMA, head_dim=24, rope=replace(LLAMA.rope, rotary_dim=24)),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_equals_an_independent_forward(config: ModelConfig) -> None:
    tensors = llama_tensors(config)
    plans = build_plans(config, "hf")
    ids = np.random.default_rng(1).integers(0, config.vocab_size, 45).tolist()
    logits = Sequences(compile_reference(plans, tensors), plans["main"]).logits({0: ids})
    np.testing.assert_allclose(logits, forward(tensors, config, ids), atol=2e-5, rtol=1e-5)


def test_chunks_and_batches_give_the_same_logits() -> None:
    plans = build_plans(LLAMA, "hf")
    runner = compile_reference(plans, llama_tensors(LLAMA))
    rng = np.random.default_rng(2)
    prompts = {s: rng.integers(0, LLAMA.vocab_size, n).tolist() for s, n in enumerate((50, 17, 33))}
    alone = {s: Sequences(runner, plans["main"], s).logits({s: ids}) for s, ids in prompts.items()}
    together = Sequences(runner, plans["main"], 9)
    found: dict[int, list[NDArray[np.float32]]] = {s: [] for s in prompts}
    for round_ in range(8):
        chunks = {}
        for s, ids in prompts.items():
            size = int(rng.integers(0, 12)) if round_ < 7 else len(ids)
            first = together.lengths.get(s, 0)
            if piece := ids[first : first + size]:
                chunks[s] = piece
        if not chunks:
            continue
        logits = together.logits(chunks)
        for s, piece in chunks.items():
            found[s].append(logits[: len(piece)])
            logits = logits[len(piece) :]
    for s in prompts:
        np.testing.assert_allclose(np.concatenate(found[s]), alone[s], atol=2e-5)


def test_float16_cache_is_near_the_float32_one() -> None:
    plans = build_plans(LLAMA, "hf")
    tensors, found = llama_tensors(LLAMA), {}
    for kind in ("f32", "f16"):
        runner = compile_reference(plans, tensors, kv_dtype=kind)
        found[kind] = Sequences(runner, plans["main"]).logits({0: range(40)})
    difference = np.abs(found["f32"] - found["f16"]).max()
    assert 0 < difference < 0.01


def test_only_wanted_rows_get_logits() -> None:
    plans = build_plans(LLAMA, "hf")
    runner = compile_reference(plans, llama_tensors(LLAMA))
    every = Sequences(runner, plans["main"]).logits({0: [5, 6, 7], 1: [8, 9]})
    last = Sequences(runner, plans["main"]).step({0: [5, 6, 7], 1: [8, 9]}, rows="last")
    assert last.logits is not None
    np.testing.assert_allclose(last.logits, every[[2, 4]], atol=1e-5)
    assert last.tokens.tolist() == every[[2, 4]].argmax(-1).tolist()


def test_unknown_architecture_says_what_is_supported() -> None:
    with pytest.raises(ModelError, match=f"'mamba' is not supported; supported: {', '.join(SUPPORTED)}"):
        build_plans(replace(LLAMA, architecture="mamba"))
    with pytest.raises(ModelError, match="can't be read from a gguf file; supported containers: hf"):
        build_plans(replace(LLAMA, architecture="glm_moe_dsa"), "gguf")


def test_missing_tensor_is_named() -> None:
    tensors = llama_tensors(LLAMA)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match=r"layers\.1\.up; looked for: .*model\.layers\.1\.mlp\.up_proj"):
        compile_reference(build_plans(LLAMA, "hf"), tensors)
