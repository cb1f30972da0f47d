"""GLM-5.1 at a tiny size on the reference backend: the test of the op list.

The oracle here is written from the architecture, not from our plan: float64, no cache, MLA expanded to full
keys and values per head, experts one token at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from hayai.backends.reference import ReferenceRunner
from hayai.config import ModelConfig
from hayai.errors import ModelError
from hayai.models.registry import build_plans
from tiny_models import GLM, Arrays, Sequences, compile_reference, glm_tensors

Doubles = NDArray[np.float64]
LONG, SHORT = 60, 12
"""Prompts beyond and within the 16 positions that sparse attention selects."""

FLASH = replace(GLM, architecture="glm4_moe_lite", index_topk=0)
GROUPED = replace(GLM, expert_groups=4, expert_top_groups=2)
CONFIGS = {"glm-5.1": GLM, "without an index": FLASH, "expert groups": GROUPED}


class Oracle:
    """The model as its papers write it. `t` tensors by checkpoint name, `c` the config."""

    def __init__(self, t: Arrays, c: ModelConfig) -> None:
        self.t, self.c = t, c

    def rms(self, x: Doubles, name: str) -> Doubles:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.c.norm_eps) * self.t[name + ".weight"]

    def linear(self, x: Doubles, name: str) -> Doubles:
        return x @ self.t[name + ".weight"].T.astype(np.float64)

    def rope(self, x: Doubles) -> Doubles:
        """Neighbouring pairs of the first qk_rope_dim dims; x (T, ..., dim)."""
        n = self.c.qk_rope_dim
        freqs = self.c.rope.theta ** (-np.arange(0, n, 2) / n)
        angles = np.exp(1j * np.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1)) * freqs)
        turned = (x[..., 0:n:2] + 1j * x[..., 1:n:2]) * angles
        out = x.copy()
        out[..., 0:n:2], out[..., 1:n:2] = turned.real, turned.imag
        return out

    def swiglu(self, x: Doubles, name: str) -> Doubles:
        gate, up = self.linear(x, name + "gate_proj"), self.linear(x, name + "up_proj")
        return self.linear(gate / (1 + np.exp(-gate)) * up, name + "down_proj")

    def selected(self, x: Doubles, qr: Doubles, name: str) -> NDArray[np.bool_]:
        """(T, T): which positions each token may attend to."""
        c, total = self.c, len(x)
        causal = np.tril(np.ones((total, total), bool))
        if not c.index_topk:
            return causal
        q = self.rope(self.linear(qr, name + "wq_b").reshape(total, c.index_heads, c.index_head_dim))
        k = self.linear(x, name + "wk")
        k = (k - k.mean(-1, keepdims=True)) / np.sqrt(k.var(-1, keepdims=True) + 1e-6)
        k = self.rope(k * self.t[name + "k_norm.weight"] + self.t[name + "k_norm.bias"])
        w = self.linear(x, name + "weights_proj") / np.sqrt(c.index_heads)
        allowed = np.zeros_like(causal)
        for s in range(total):
            dots = q[s] @ k[: s + 1].T / np.sqrt(c.index_head_dim)
            scores = w[s] @ np.maximum(dots, 0)
            best = sorted(range(s + 1), key=lambda p: (-scores[p], p))[: c.index_topk]
            allowed[s, best] = True
        return allowed

    def attention(self, x: Doubles, name: str) -> Doubles:
        c, total = self.c, len(x)
        nope, rope = c.qk_nope_dim, c.qk_rope_dim
        qr = self.rms(self.linear(x, name + "q_a_proj"), name + "q_a_layernorm")
        q = self.linear(qr, name + "q_b_proj").reshape(total, c.num_heads, nope + rope)
        a = self.linear(x, name + "kv_a_proj_with_mqa")
        latent = self.rms(a[:, : c.kv_lora_rank], name + "kv_a_layernorm")
        kv = self.linear(latent, name + "kv_b_proj").reshape(total, c.num_heads, nope + c.value_dim)
        k_rope = self.rope(a[:, c.kv_lora_rank :])
        allowed = self.selected(x, qr, name + "indexer.")
        heads = []
        for h in range(c.num_heads):
            queries = np.concatenate([q[:, h, :nope], self.rope(q[:, h, nope:])], -1)
            keys = np.concatenate([kv[:, h, :nope], k_rope], -1)
            s = np.where(allowed, queries @ keys.T / np.sqrt(nope + rope), -np.inf)
            p = np.exp(s - s.max(-1, keepdims=True))
            heads.append(p / p.sum(-1, keepdims=True) @ kv[:, h, nope:])
        return self.linear(np.concatenate(heads, -1), name + "o_proj")

    def experts(self, x: Doubles, name: str) -> Doubles:
        c = self.c
        y = self.swiglu(x, name + "shared_experts.")
        scores = 1 / (1 + np.exp(-self.linear(x, name + "gate")))
        for i, s in enumerate(scores):
            choice = s + self.t[name + "gate.e_score_correction_bias"]
            groups = choice.reshape(c.expert_groups, -1)
            strength = np.sort(groups, -1)[:, -2:].sum(-1)
            kept = np.argsort(-strength)[: c.expert_top_groups]
            size = groups.shape[1]
            open_ = [e for e in range(c.num_experts) if e // size in kept]
            chosen = sorted(open_, key=lambda e: -choice[e])[: c.experts_per_token]
            total = sum(s[e] for e in chosen)
            for e in chosen:
                share = s[e] / total * c.router_scaling
                y[i] += share * self.swiglu(x[i : i + 1], f"{name}experts.{e}.")[0]
        return y

    def layer(self, h: Doubles, index: int) -> Doubles:
        name = f"model.layers.{index}."
        h = h + self.attention(self.rms(h, name + "input_layernorm"), name + "self_attn.")
        x = self.rms(h, name + "post_attention_layernorm")
        mlp: Callable[[Doubles, str], Doubles] = (
            self.swiglu if index < self.c.num_dense_layers else self.experts
        )
        return h + mlp(x, name + "mlp.")

    def main(self, ids: list[int]) -> tuple[Doubles, Doubles]:
        """Hidden rows after the final norm, and logits."""
        h = self.t["model.embed_tokens.weight"][ids].astype(np.float64)
        for index in range(self.c.num_layers):
            h = self.layer(h, index)
        h = self.rms(h, "model.norm")
        return h, self.linear(h, "lm_head")

    def draft(self, hidden: Doubles, following: list[int]) -> tuple[Doubles, Doubles]:
        """The draft layer on hidden rows of positions 0.. and the token after each."""
        name = f"model.layers.{self.c.num_layers}."
        table = self.t.get(name + "embed_tokens.weight", self.t["model.embed_tokens.weight"])
        e = self.rms(table[following].astype(np.float64), name + "enorm")
        z = self.linear(np.concatenate([e, self.rms(hidden, name + "hnorm")], -1), name + "eh_proj")
        m = self.rms(self.layer(z, self.c.num_layers), name + "shared_head.norm")
        own = name + "shared_head.head"
        return m, self.linear(m, own if own + ".weight" in self.t else "lm_head")


def random_ids(count: int, seed: int = 3) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, GLM.vocab_size, count)]


def model(config: ModelConfig = GLM, **options: bool) -> tuple[ReferenceRunner, Arrays, Sequences]:
    plans, tensors = build_plans(config, "hf"), glm_tensors(config, **options)
    runner = compile_reference(plans, tensors)
    return runner, tensors, Sequences(runner, plans["main"])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("count", [SHORT, LONG])
def test_absorbed_equals_expanded(config: ModelConfig, count: int) -> None:
    _, tensors, sequences = model(config)
    ids = random_ids(count)
    expected = Oracle(tensors, config).main(ids)[1]
    np.testing.assert_allclose(sequences.logits({0: ids}), expected, atol=1e-5, rtol=1e-5)


def test_sparse_attention_matters_beyond_topk_only() -> None:
    """The same weights without the index: equal within 16 positions, different after."""
    ids = random_ids(LONG)
    tensors = glm_tensors(GLM)
    sparse, dense = (
        Sequences(compile_reference(plans, tensors), plans["main"]).logits({0: ids})
        for plans in (build_plans(GLM, "hf"), build_plans(FLASH, "hf"))
    )
    gap = np.abs(sparse - dense).max(axis=-1)
    assert gap[: GLM.index_topk].max() < 1e-5
    assert gap[GLM.index_topk :].max() > 1e-2


def test_prefill_equals_token_by_token() -> None:
    _, _, sequences = model()
    ids = random_ids(LONG)
    prefill = sequences.logits({0: ids})
    steps = np.concatenate([sequences.logits({1: [token]}) for token in ids])
    np.testing.assert_allclose(steps, prefill, atol=1e-5)


def test_several_sequences_equal_one() -> None:
    runner, _, together = model()
    prompts = {s: random_ids(n, s) for s, n in enumerate((LONG, SHORT, 33))}
    parts: dict[int, list[NDArray[np.float32]]] = {s: [] for s in prompts}
    for start in range(0, LONG, 13):
        chunks = {s: ids[start : start + 13] for s, ids in prompts.items() if ids[start : start + 13]}
        logits = together.logits(chunks)
        for s, piece in chunks.items():
            parts[s].append(logits[: len(piece)])
            logits = logits[len(piece) :]
    for s, ids in prompts.items():
        alone = Sequences(runner, together.plan, 50 + s).logits({0: ids})
        np.testing.assert_allclose(np.concatenate(parts[s]), alone, atol=1e-5)


@pytest.mark.parametrize("own_tables", [False, True], ids=["main tables", "own tables"])
def test_draft_equals_an_independent_forward(own_tables: bool) -> None:
    """Prefill in two chunks, the draft after each as an engine runs it; then drafting on the draft's rows."""
    _, tensors, sequences = model(own_draft_tables=own_tables)
    oracle = Oracle(tensors, GLM)
    ids = random_ids(LONG + 2)
    hidden, _ = oracle.main(ids[:LONG])
    rows, expected = oracle.draft(hidden, ids[1 : LONG + 1])
    found = []
    for start, stop in ((0, 25), (25, LONG)):
        sequences.step({0: ids[start:stop]})
        carried = np.arange(stop - start, dtype=np.int32)
        found.append(
            sequences.logits({0: ids[start + 1 : stop + 1]}, plan="draft", at={0: start}, carry_rows=carried)
        )
    np.testing.assert_allclose(np.concatenate(found), expected, atol=2e-5)

    # One more draft from the last row: its input is the draft's own normed row, one position on.
    again = sequences.logits(
        {0: ids[LONG + 1 :]}, plan="draft", carry_rows=np.array([LONG - 25 - 1], np.int32)
    )
    _, expected = oracle.draft(np.concatenate([hidden, rows[-1:]]), ids[1:])
    np.testing.assert_allclose(again[0], expected[-1], atol=2e-5)


def test_draft_of_several_sequences() -> None:
    """carry_rows picks each sequence's rows, whatever the order of the step before."""
    runner, _, together = model()
    prompts = {0: random_ids(20, 5), 1: random_ids(31, 6)}
    together.step(prompts)
    following = {s: [*ids[1:], 7] for s, ids in prompts.items()}
    swapped = np.r_[20:51, 0:20].astype(np.int32)
    logits = together.logits(
        {1: following[1], 0: following[0]}, plan="draft", at={0: 0, 1: 0}, carry_rows=swapped
    )
    for s, part in ((1, logits[:31]), (0, logits[31:])):
        alone = Sequences(runner, together.plan, 50 + s)
        alone.step({0: prompts[s]})
        rows = np.arange(len(prompts[s]), dtype=np.int32)
        again = alone.logits({0: following[s]}, plan="draft", at={0: 0}, carry_rows=rows)
        np.testing.assert_allclose(part, again, atol=1e-5)


def test_draft_shares_slots_and_cache_groups() -> None:
    plans = build_plans(GLM, "hf")
    main, draft = plans["main"], plans["draft"]
    assert main.groups == draft.groups
    assert main.groups["mla"].num_layers == GLM.num_layers + 1
    shared = set(main.slots) & set(draft.slots)
    assert shared == {"embed", "lm_head"}
    assert all(main.slots[name] == draft.slots[name] for name in shared)


def test_more_draft_layers_are_refused() -> None:
    with pytest.raises(ModelError, match="2 draft layers; supported: none or one"):
        build_plans(replace(GLM, num_draft_layers=2), "hf")
