"""Caches and attention of the reference backend against loops over positions; unused cache memory is NaN."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hayai.backends.base import BLOCK_SIZE, StepInput
from hayai.backends.reference_cache import Cache, PagedCache, StateCache
from hayai.backends.reference_context import StepContext, Weights
from hayai.backends.reference_ops import run_lockstep
from hayai.plan import ops
from hayai.plan.plan import CacheGroup, Plan, WeightSlot
from hayai.weights.loader import FileWeights
from tiny_models import MemoryFile

Floats = NDArray[np.float32]
BLOCKS = 24
RNG = np.random.default_rng(7)


def randoms(*shape: int) -> Floats:
    return RNG.standard_normal(shape).astype(np.float32)


@dataclass
class Bench:
    """Runs cache ops on chunks of several sequences; keeps every row that each sequence was fed."""

    op: ops.Op
    caches: dict[str, Cache]
    weights: dict[str, Floats] = field(default_factory=dict)
    tables: dict[int, NDArray[np.int32]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    free: list[int] = field(default_factory=lambda: RNG.permutation(BLOCKS).tolist())

    def __post_init__(self) -> None:
        for cache in self.caches.values():
            if isinstance(cache, PagedCache):
                for array in cache.arrays:
                    array.fill(np.nan)

    def run(
        self,
        chunks: dict[int, dict[str, NDArray[Any]]],
        appends: tuple[ops.KvAppend, ...] = (),
        depths: dict[int, list[int]] | None = None,
        **fields: Any,
    ) -> dict[int, NDArray[Any]]:
        """`chunks`: sequence -> buffer -> its rows. Returns the op's result rows per sequence."""
        starts, positions = [0], []
        for sequence, buffers in chunks.items():
            count = len(next(iter(buffers.values())))
            first = self.lengths.get(sequence, 0)
            self.lengths[sequence] = first + count
            table = self.tables.setdefault(sequence, np.array([self.free.pop() for _ in range(4)], np.int32))
            assert self.lengths[sequence] <= len(table) * BLOCK_SIZE
            positions += [first + d for d in (depths or {}).get(sequence, range(count))]
            starts.append(starts[-1] + count)
        names = next(iter(chunks.values()))
        env = {name: np.concatenate([chunk[name] for chunk in chunks.values()]) for name in names}
        empty = np.zeros(0, np.int32)
        step = StepInput(
            np.zeros(starts[-1], np.int32),
            np.array(positions, np.int32),
            np.array(starts, np.int32),
            {name: np.stack([self.tables[s] for s in chunks]) for name in self.caches},
            empty,
            (),
            **fields,
        )
        slots = {name: WeightSlot(name, w.shape, {"hf": (name,)}) for name, w in self.weights.items()}
        plan = Plan("main", {}, slots, {}, (*appends, self.op))
        source = FileWeights(MemoryFile(self.weights), "hf")
        if step.tree_mask is not None:
            env["mask"] = step.tree_mask
        ctx = StepContext(plan, step, Weights({"main": plan}, source), self.caches, False, env)
        run_lockstep([ctx])
        out = ctx.env[self.op.names("writes")[0]]
        return {s: out[starts[i] : starts[i + 1]] for i, s in enumerate(chunks)}


HEADS, KV_HEADS, KEY, VALUE, LATENT, ROPE = 6, 3, 5, 7, 9, 3
FULL = CacheGroup("kv", "full", 2, KV_HEADS, KEY, VALUE)
MLA = CacheGroup("kv", "mla", 2, 1, LATENT, ROPE)
INDEX = CacheGroup("kv", "index", 2, 1, KEY, 0)

PLAIN = ops.Attention("q", "out", "kv", 1, HEADS, KV_HEADS, KEY, VALUE, 0.4)
LATENTS = ops.Attention("q", "out", "kv", 1, HEADS, 1, LATENT, LATENT, 0.3, q_rope="qr")
VARIANTS = {
    "full": PLAIN,
    "window": replace(PLAIN, window=6),
    "softcap": replace(PLAIN, softcap=1.5),
    "sinks": replace(PLAIN, sinks="sinks"),
    "sparse": replace(PLAIN, select="select"),
    "all at once": replace(PLAIN, window=9, softcap=1.5, sinks="sinks", select="select"),
    "mla": LATENTS,
    "sparse mla": replace(LATENTS, select="select"),
}
APPEND = ops.KvAppend("k", "v", "kv", 1)


def make_rows(op: ops.Attention, count: int, first: int) -> dict[str, NDArray[Any]]:
    """Random operands of one sequence's chunk whose first position is `first`."""
    mla = op.q_rope is not None
    rows: dict[str, NDArray[Any]] = {
        "q": randoms(count, HEADS * op.head_dim),
        "k": randoms(count, LATENT if mla else KV_HEADS * KEY),
        "v": randoms(count, ROPE if mla else KV_HEADS * VALUE),
    }
    if mla:
        rows["qr"] = randoms(count, HEADS * ROPE)
    if op.select is not None:
        rows["select"] = np.full((count, 5), -1, np.int32)
        for t in range(count):
            chosen = np.sort(RNG.permutation(first + t + 1)[:5])
            rows["select"][t, : len(chosen)] = chosen
    return rows


def plain_attention(op: ops.Attention, rows: dict[str, NDArray[Any]], sinks: Floats) -> NDArray[np.float64]:
    """All rows of one sequence from position 0, one query, head and position at a time."""
    total = len(rows["q"])
    out = np.zeros((total, op.num_heads, op.value_dim))
    q = rows["q"].reshape(total, op.num_heads, -1).astype(np.float64)
    for t in range(total):
        for h in range(op.num_heads):
            g = h // (op.num_heads // op.num_kv_heads)
            seen, scores, values = [], [], []
            for p in range(t + 1):
                if op.window and p <= t - op.window:
                    continue
                if op.select is not None and p not in rows["select"][t]:
                    continue
                seen.append(p)
                if op.q_rope is None:
                    key = rows["k"][p, g * KEY : (g + 1) * KEY]
                    values.append(rows["v"][p, g * VALUE : (g + 1) * VALUE])
                    score = float(q[t, h] @ key)
                else:
                    values.append(rows["k"][p])
                    rope = rows["qr"][t, h * ROPE : (h + 1) * ROPE]
                    score = float(q[t, h] @ rows["k"][p]) + float(rope @ rows["v"][p])
                score *= op.scale
                scores.append(op.softcap * math.tanh(score / op.softcap) if op.softcap else score)
            if op.sinks is not None:
                total_weight = sum(map(math.exp, scores)) + math.exp(sinks[h])
            else:
                total_weight = sum(map(math.exp, scores))
            for score, value in zip(scores, values, strict=True):
                out[t, h] += math.exp(score) / total_weight * value
    return out.reshape(total, -1)


def attention_bench(op: ops.Attention, dtype: type = np.float32) -> Bench:
    group = MLA if op.q_rope is not None else FULL
    weights = {"sinks": randoms(HEADS)} if op.sinks is not None else {}
    return Bench(op, {"kv": PagedCache(group, BLOCKS, dtype)}, weights)


@pytest.mark.parametrize("op", VARIANTS.values(), ids=VARIANTS.keys())
def test_attention_in_chunks_of_several_sequences(op: ops.Attention) -> None:
    bench = attention_bench(op)
    fed: dict[int, list[dict[str, NDArray[Any]]]] = {0: [], 1: []}
    found: dict[int, list[NDArray[Any]]] = {0: [], 1: []}
    for sizes in ({0: 7}, {1: 17, 0: 10}, {0: 1, 1: 1}, {1: 3}):
        chunks = {s: make_rows(op, n, bench.lengths.get(s, 0)) for s, n in sizes.items()}
        for s, rows in bench.run(chunks, (APPEND,)).items():
            fed[s].append(chunks[s])
            found[s].append(rows)
    for s, parts in fed.items():
        rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        expected = plain_attention(op, rows, bench.weights.get("sinks", randoms(0)))
        np.testing.assert_allclose(np.concatenate(found[s]), expected, atol=2e-5)


def test_keys_are_read_back_as_stored() -> None:
    """With a float16 cache, the running step's own keys and values are rounded too."""
    rows = make_rows(PLAIN, 9, 0)
    out = attention_bench(PLAIN, np.float16).run({0: rows}, (APPEND,))[0]
    stored = {
        name: a.astype(np.float16).astype(np.float32) if name in "kv" else a for name, a in rows.items()
    }
    np.testing.assert_allclose(out, plain_attention(PLAIN, stored, randoms(0)), atol=2e-5)
    assert np.abs(out - plain_attention(PLAIN, rows, randoms(0))).max() > 1e-4


def test_selection_of_nothing_gives_zeros() -> None:
    rows = make_rows(VARIANTS["sparse"], 3, 0)
    rows["select"][:] = -1
    out = attention_bench(VARIANTS["sparse"]).run({0: rows}, (APPEND,))[0]
    np.testing.assert_array_equal(out, 0)


def test_tree_mask() -> None:
    """A root with two branches of two tokens after a common past equals each branch fed on its own."""
    op = replace(PLAIN, tree_mask="mask")
    past, tree = make_rows(PLAIN, 20, 0), make_rows(PLAIN, 5, 20)
    branches = ([0, 1, 2], [0, 3, 4])  # rows of the tree
    mask = np.zeros((5, 5), np.int32)
    for branch in branches:
        for i, row in enumerate(branch):
            mask[row, branch[: i + 1]] = 1
    bench = attention_bench(PLAIN)
    bench.run({0: past}, (APPEND,))
    bench.op = op
    found = bench.run({0: tree}, (APPEND,), depths={0: [0, 1, 2, 1, 2]}, tree_mask=mask)[0]
    for branch in branches:
        rows = {name: np.concatenate([past[name], tree[name][branch]]) for name in past}
        np.testing.assert_allclose(found[branch], plain_attention(PLAIN, rows, randoms(0))[20:], atol=2e-5)


def test_copied_blocks_hold_the_same() -> None:
    bench = attention_bench(PLAIN)
    past, more = make_rows(PLAIN, 20, 0), make_rows(PLAIN, 2, 20)
    bench.run({0: past}, (APPEND,))
    bench.tables[1] = np.array([bench.free.pop() for _ in range(4)], np.int32)
    bench.lengths[1] = 20
    bench.caches["kv"].copy_blocks(bench.tables[0][:2], bench.tables[1][:2])
    first = bench.run({0: more}, (APPEND,))[0]
    np.testing.assert_array_equal(bench.run({1: more}, (APPEND,))[1], first)


# ---------------------------------------------------------------- index_topk


TOPK = ops.IndexTopk("q", "w", "out", "kv", 0, 4, KEY, 6, 0.5)
INDEX_APPEND = ops.KvAppend("k", None, "kv", 0)


def plain_topk(rows: dict[str, NDArray[Any]]) -> list[list[int]]:
    chosen = []
    for t in range(len(rows["q"])):
        scores = []
        for p in range(t + 1):
            dots = rows["q"][t].reshape(4, KEY).astype(np.float64) @ rows["k"][p]
            scores.append(sum(w * max(0.0, 0.5 * d) for w, d in zip(rows["w"][t], dots, strict=True)))
        best = sorted(sorted(range(t + 1), key=lambda p: (-scores[p], p))[:6])
        chosen.append(best + [-1] * (6 - len(best)))
    return chosen


def test_index_topk_in_chunks() -> None:
    bench = Bench(TOPK, {"kv": PagedCache(INDEX, BLOCKS, np.float32)})
    parts, found = [], []
    for count in (4, 20, 1):
        parts.append({"q": randoms(count, 4 * KEY), "k": randoms(count, KEY), "w": randoms(count, 4)})
        found.append(bench.run({0: parts[-1]}, (INDEX_APPEND,))[0])
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    out = np.concatenate(found)
    assert out.dtype == np.int32
    assert out.tolist() == plain_topk(rows)


def test_index_topk_gives_ties_to_the_lowest_position() -> None:
    rows = {"q": np.ones((10, 4 * KEY), np.float32), "k": np.ones((10, KEY), np.float32)}
    rows["w"] = np.ones((10, 4), np.float32)
    out = Bench(TOPK, {"kv": PagedCache(INDEX, BLOCKS, np.float32)}).run({0: rows}, (INDEX_APPEND,))[0]
    assert out[9].tolist() == [0, 1, 2, 3, 4, 5]
    assert out[2].tolist() == [0, 1, 2, -1, -1, -1]


# ---------------------------------------------------------------- linear_state


STATE = CacheGroup("kv", "state", 1, 2, 3, 4, can_rollback=False)
RECUR = ops.LinearState("q", "k", "v", "d", "out", "kv", 0, 2, 3, 4)


def state_rows(count: int) -> dict[str, NDArray[Any]]:
    return {
        "q": randoms(count, 6),
        "k": randoms(count, 6),
        "v": randoms(count, 8),
        "d": -np.abs(randoms(count, 6)) * 0.1,
    }


def test_linear_state_is_a_decaying_sum() -> None:
    """out_t = sum over s <= t of (q_t . exp(decay from s + 1 to t) * k_s) v_s, per head; in any chunks."""
    bench = Bench(RECUR, {"kv": StateCache(STATE)})
    parts, found = [], []
    for count in (5, 1, 9):
        parts.append(state_rows(count))
        found.append(bench.run({0: parts[-1], 3: state_rows(2)})[0])
    rows = {name: np.concatenate([part[name] for part in parts]).astype(np.float64) for name in parts[0]}
    q, k, d = (rows[name].reshape(15, 2, 3) for name in "qkd")
    v = rows["v"].reshape(15, 2, 4)
    expected = np.zeros((15, 2, 4))
    for t in range(15):
        for s in range(t + 1):
            kept = np.exp(d[s + 1 : t + 1].sum(axis=0))
            for h in range(2):
                expected[t, h] += (q[t, h] * kept[h] * k[s, h]).sum() * v[s, h]
    np.testing.assert_allclose(np.concatenate(found).reshape(15, 2, 4), expected, atol=1e-5)


def test_linear_state_starts_anew_at_position_0() -> None:
    bench = Bench(RECUR, {"kv": StateCache(STATE)})
    rows = state_rows(6)
    first = bench.run({0: rows})[0]
    bench.lengths[0] = 0
    np.testing.assert_array_equal(bench.run({0: rows})[0], first)


def test_copied_states() -> None:
    bench = Bench(RECUR, {"kv": StateCache(STATE)})
    bench.run({0: state_rows(6)})
    bench.tables[1] = np.array([bench.free.pop() for _ in range(4)], np.int32)
    bench.lengths[1] = 6
    bench.caches["kv"].copy_blocks(bench.tables[0][:1], bench.tables[1][:1])
    more = state_rows(3)
    first = bench.run({0: more})[0]
    np.testing.assert_array_equal(bench.run({1: more})[1], first)
