"""The closed set of operations: what a model may ask for, and nothing about how it is done.

Every op is a frozen dataclass. Fields that name a buffer or a weight slot are plain strings; which they
are is told by the two class tables `reads`/`writes` (buffers) and `slots` (weights), so that passes,
validation, dumps and backends can walk any op without knowing it.

Symbols used in shapes: T tokens of the step, S sequences, R rows whose logits are wanted.
The list is frozen in docs/decisions/001-op-list.md; a new op needs a note there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched. `kind` is 'linear', 'llama3' or 'factors'.

    linear: every frequency is divided by `factor`.
    llama3: wavelengths above original_context/low_freq_factor are divided by `factor`, those below
    original_context/high_freq_factor are kept, with a linear blend between (Llama 3.1 report).
    factors: frequency i is divided by the i-th element of the weight slot `factors_slot`.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    factors_slot: str | None = None


@dataclass(frozen=True)
class Op:
    """Base of all ops. `reads`/`writes`/`slots` name the *fields* that hold buffers and weight slots.

    A field may hold None (absent) or a tuple of names.
    """

    reads: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[tuple[str, ...]] = ()
    slots: ClassVar[tuple[str, ...]] = ()

    @property
    def kind(self) -> str:
        """Snake-case name of the op, as dumps and error messages spell it."""
        name = type(self).__name__
        return "".join("_" + c.lower() if c.isupper() and i else c.lower() for i, c in enumerate(name))

    def names(self, table: str) -> tuple[str, ...]:
        """All buffer or slot names of one table ('reads', 'writes' or 'slots'), absent ones left out."""
        found: list[str] = []
        for field in getattr(self, table):
            value = getattr(self, field)
            if value is None:
                continue
            found.extend(v for v in ((value,) if isinstance(value, str) else value) if v is not None)
        return tuple(found)


# ---------------------------------------------------------------- tokens and elementwise


@dataclass(frozen=True)
class Embed(Op):
    """out[t] = scale * table[ids[t]].   ids (T) int32, table slot (vocab, hidden), out (T, hidden)."""

    ids: str
    table: str
    out: str
    scale: float = 1.0
    reads = ("ids",)
    writes = ("out",)
    slots = ("table",)


@dataclass(frozen=True)
class RmsNorm(Op):
    """out = x / sqrt(mean(x^2) + eps) * (weight + weight_offset), over the last dimension."""

    x: str
    weight: str
    out: str
    eps: float
    weight_offset: float = 0.0
    reads = ("x",)
    writes = ("out",)
    slots = ("weight",)


@dataclass(frozen=True)
class LayerNorm(Op):
    """out = (x - mean) / sqrt(var + eps) * weight + bias, over the last dimension."""

    x: str
    weight: str
    bias: str | None
    out: str
    eps: float
    reads = ("x",)
    writes = ("out",)
    slots = ("weight", "bias")


@dataclass(frozen=True)
class HeadNorm(Op):
    """RMS norm of each head on its own: x (T, heads * head_dim), weight (head_dim) shared by heads."""

    x: str
    weight: str
    out: str
    head_dim: int
    eps: float
    weight_offset: float = 0.0
    reads = ("x",)
    writes = ("out",)
    slots = ("weight",)


@dataclass(frozen=True)
class Rope(Op):
    """Rotate `rotary_dim` dims of each head, starting at dim `start`, by position * theta^(-2i/rotary_dim).

    interleaved: pairs (2i, 2i+1); else pairs (i, i + rotary_dim/2). Other dims pass through.
    x and out (T, heads * head_dim); positions (T) int32. In place (x == out) is allowed.
    """

    x: str
    positions: str
    out: str
    head_dim: int
    rotary_dim: int
    theta: float
    interleaved: bool
    start: int = 0
    scaling: RopeScaling | None = None
    reads = ("x", "positions")
    writes = ("out",)
    slots = ("factors_slot",)

    @property
    def factors_slot(self) -> str | None:
        """Slot (rotary_dim / 2) of per-frequency divisors, where the scaling uses one."""
        return self.scaling.factors_slot if self.scaling else None


@dataclass(frozen=True)
class Glu(Op):
    """out = act(gate) * up.   act: 'silu', 'gelu' (erf) or 'gelu_tanh'."""

    gate: str
    up: str
    out: str
    act: str = "silu"
    reads = ("gate", "up")
    writes = ("out",)


@dataclass(frozen=True)
class Activation(Op):
    """out = act(x).   act: 'silu', 'gelu', 'gelu_tanh', 'relu', 'sigmoid'."""

    x: str
    out: str
    act: str
    reads = ("x",)
    writes = ("out",)


@dataclass(frozen=True)
class Add(Op):
    """out = a + b, same shapes. out may be a or b (the residual stream is updated in place)."""

    a: str
    b: str
    out: str
    reads = ("a", "b")
    writes = ("out",)


@dataclass(frozen=True)
class Scale(Op):
    """out = x * factor."""

    x: str
    out: str
    factor: float
    reads = ("x",)
    writes = ("out",)


@dataclass(frozen=True)
class Softcap(Op):
    """out = cap * tanh(x / cap)."""

    x: str
    out: str
    cap: float
    reads = ("x",)
    writes = ("out",)


@dataclass(frozen=True)
class Copy(Op):
    """out = x. The way into and out of carry buffers."""

    x: str
    out: str
    reads = ("x",)
    writes = ("out",)


@dataclass(frozen=True)
class GatherRows(Op):
    """out[r] = x[rows[r]].   rows (R) int32: the rows whose logits are wanted."""

    x: str
    rows: str
    out: str
    reads = ("x", "rows")
    writes = ("out",)


# ---------------------------------------------------------------- matrices


@dataclass(frozen=True)
class Linear(Op):
    """outs[i] = x @ weights[i].T (+ biases[i]).   One input, a group of matrices (q,k,v or gate,up).

    x (T, in); weights[i] slot (out_i, in); biases is () or one slot name or None per matrix.
    """

    x: str
    weights: tuple[str, ...]
    outs: tuple[str, ...]
    biases: tuple[str | None, ...] = ()
    reads = ("x",)
    writes = ("outs",)
    slots = ("weights", "biases")


@dataclass(frozen=True)
class HeadLinear(Op):
    """One matrix per head: out[t, h] = weight[h] @ x[t, h].   (MLA absorption)

    x (T, heads * in); weight slot (heads, out, in); out (T, heads * out).
    """

    x: str
    weight: str
    out: str
    num_heads: int
    reads = ("x",)
    writes = ("out",)
    slots = ("weight",)


@dataclass(frozen=True)
class LmHead(Op):
    """logits = cap(x @ weight.T).   x (R, hidden), weight slot (vocab, hidden), out (R, vocab).

    `softcap` 0 means none. A backend need not materialise `out` where only the argmax is asked for.
    """

    x: str
    weight: str
    out: str
    softcap: float = 0.0
    reads = ("x",)
    writes = ("out",)
    slots = ("weight",)


# ---------------------------------------------------------------- attention


@dataclass(frozen=True)
class KvAppend(Op):
    """Store this step's keys (and values) of one layer in its cache group.

    A sequence's i-th token of the step goes to cache position positions[its first token] + i.
    full, window: k, v (T, kv_heads * head_dim).  mla: k = latent (T, latent), v = rope part (T, rope).
    index: k (T, index_dim), v None.  `layer` counts the layers of the group.
    """

    k: str
    v: str | None
    group: str
    layer: int
    reads = ("k", "v")


@dataclass(frozen=True)
class Attention(Op):
    """Causal attention of this step's queries over the cache of their own sequence.

    out_h = sum_p softmax_p(cap(scale * <q_h, k_p>)) v_p over positions p <= own position, and
    p > own position - window when window > 0, and p in select[t] when `select` is given (-1 = none).
    Keys and values are read back as stored, also those of the running step.
    tree_mask (T, T) int32: token t sees the positions before its sequence's first token of the step, and
    of the step's tokens u those with tree_mask[t, u] != 0. (`positions` is then the depth in a tree.)

    full, window: q (T, heads*head_dim), out (T, heads*value_dim); query head h reads kv head
    h // (heads // kv_heads).
    mla: q = absorbed latent query (T, heads*latent), q_rope (T, heads*rope), out (T, heads*latent);
    score = <q, latent_p> + <q_rope, rope_p>, value = latent_p.
    sinks: slot (heads): an extra logit per head that takes part in the softmax and has no value.
    """

    q: str
    out: str
    group: str
    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    softcap: float = 0.0
    window: int = 0
    q_rope: str | None = None
    select: str | None = None
    sinks: str | None = None
    tree_mask: str | None = None
    reads = ("q", "q_rope", "select", "tree_mask")
    writes = ("out",)
    slots = ("sinks",)


@dataclass(frozen=True)
class IndexTopk(Op):
    """Positions that sparse attention may read (GLM-5, DeepSeek-V3.2).

    I(t, p) = sum_h w[t,h] * max(0, scale * <q[t,h], k_p>) for p <= own position;
    out[t] = positions of the topk largest, ascending, padded with -1; ties go to the lowest position.
    q (T, heads*head_dim), weights (T, heads), out (T, topk) int32; k from the 'index' cache group.
    tree_mask: as in Attention.
    """

    q: str
    weights: str
    out: str
    group: str
    layer: int
    num_heads: int
    head_dim: int
    topk: int
    scale: float
    tree_mask: str | None = None
    reads = ("q", "weights", "tree_mask")
    writes = ("out",)


# ---------------------------------------------------------------- mixture of experts


@dataclass(frozen=True)
class Route(Op):
    """Choose experts. logits (T, experts) -> ids (T, top_k) int32, weights (T, top_k).

    s = sigmoid or softmax(logits); choice = s + bias; with groups, only the `top_groups` groups with the
    largest sum of their two best choices stay; ids = top_k of choice, largest first, ties to the lowest
    id; weights = s[ids], normalised to sum 1 when `normalize`, times `scaling`.
    """

    logits: str
    ids: str
    weights: str
    top_k: int
    score: str
    bias: str | None = None
    num_groups: int = 1
    top_groups: int = 1
    normalize: bool = True
    scaling: float = 1.0
    reads = ("logits",)
    writes = ("ids", "weights")
    slots = ("bias",)


@dataclass(frozen=True)
class MoeLinear(Op):
    """outs[i][t, j] = weights[i][ids[t, j]] @ x.   x (T, in), or (T, top_k, in) when `per_expert`.

    weights[i] slot (experts, out_i, in); outs[i] (T, top_k, out_i).
    """

    x: str
    ids: str
    weights: tuple[str, ...]
    outs: tuple[str, ...]
    per_expert: bool = False
    reads = ("x", "ids")
    writes = ("outs",)
    slots = ("weights",)


@dataclass(frozen=True)
class MoeCombine(Op):
    """out[t] = sum_j weights[t, j] * x[t, j], in slot order.   x (T, top_k, hidden), out (T, hidden)."""

    x: str
    weights: str
    out: str
    reads = ("x", "weights")
    writes = ("out",)


# ---------------------------------------------------------------- recurrent state


@dataclass(frozen=True)
class LinearState(Op):
    """Gated linear attention over a per-sequence state (cache group kind 'state').

    Per head: S <- diag(exp(decay)) S + k v^T; out = q^T S.  q, k (T, heads*key_dim), v (T, heads*value_dim),
    decay (T, heads*key_dim) <= 0 in log space.  Summed in fixed chunks of 64 tokens aligned to position 0.
    """

    q: str
    k: str
    v: str
    decay: str
    out: str
    group: str
    layer: int
    num_heads: int
    key_dim: int
    value_dim: int
    reads = ("q", "k", "v", "decay")
    writes = ("out",)


# ---------------------------------------------------------------- sampling


@dataclass(frozen=True)
class Sample(Op):
    """Choose one token per row from logits (R, vocab) by the step's sampling parameters; out (R) int32."""

    logits: str
    out: str
    reads = ("logits",)
    writes = ("out",)


# ---------------------------------------------------------------- collectives (inserted by passes)


@dataclass(frozen=True)
class AllReduce(Op):
    """out = sum of x over ranks, in rank order."""

    x: str
    out: str
    reads = ("x",)
    writes = ("out",)


@dataclass(frozen=True)
class AllGather(Op):
    """out = x of all ranks, concatenated along `dim` in rank order."""

    x: str
    out: str
    dim: int = -1
    reads = ("x",)
    writes = ("out",)


@dataclass(frozen=True)
class ReduceScatter(Op):
    """out = this rank's share, along `dim`, of the sum over ranks."""

    x: str
    out: str
    dim: int = -1
    reads = ("x",)
    writes = ("out",)


@dataclass(frozen=True)
class AllToAll(Op):
    """Row block i of x goes to rank i; out is what was received, in rank order."""

    x: str
    out: str
    reads = ("x",)
    writes = ("out",)


ALL_OPS: tuple[type[Op], ...] = (
    Embed, RmsNorm, LayerNorm, HeadNorm, Rope, Glu, Activation, Add, Scale, Softcap, Copy, GatherRows,
    Linear, HeadLinear, LmHead, KvAppend, Attention, IndexTopk, Route, MoeLinear, MoeCombine, LinearState,
    Sample, AllReduce, AllGather, ReduceScatter, AllToAll,
)  # fmt: skip
