"""Paged attention against float64, and its bits across query blocks, chunks and splits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from kernel_harness import ISAS, KERNELS, Array, Guarded, aligned, same_bits

SPLIT, PAGE = 64, 16

KV_FORMATS = ("f16", "q8")
HALF_MAX = 65504.0

pytestmark = [pytest.mark.parametrize("isa", ISAS), pytest.mark.parametrize("kv", KV_FORMATS)]


@dataclass(frozen=True)
class Case:
    """One sequence's cache of `length` positions for one kv head, keys and values as they are stored.

    Page bytes never written are NaN, or a scale of NaN.
    """

    isa: str
    kv: str
    heads: int
    head_dim: int
    value_dim: int
    length: int
    keys: Array
    values: Array
    pages: Array
    table: Array

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


def page_bytes(kv: str, head_dim: int, value_dim: int) -> int:
    dims = head_dim + value_dim
    return PAGE * (2 * dims if kv == "f16" else dims + 4)


def clamp(x: Array, most: float) -> Array:
    return np.clip(np.where(np.isnan(x), np.float32(most), x), -np.float32(most), np.float32(most))


def q8(x: Array) -> tuple[Array, Array]:
    """Codes (n, dims) and fp16 scales (n) of vectors (n, dims)."""
    x = clamp(x, 127 * HALF_MAX)
    scale = (np.abs(x).max(axis=1) / np.float32(127)).astype(np.float16)
    wide = scale.astype(np.float32)[:, None]
    ratio = np.divide(x, wide, out=np.zeros_like(x), where=wide > 0)
    return np.rint(np.clip(ratio, -127, 127)).astype(np.int8), scale


def stored(kv: str, x: Array) -> Array:
    """Vectors (n, dims) as they are read back, in float64."""
    if kv == "f16":
        return clamp(x, HALF_MAX).astype(np.float16).astype(np.float64)
    codes, scale = q8(x)
    return codes * scale.astype(np.float64)[:, None]


def make_case(
    isa: str, kv: str, heads: int, head_dim: int, value_dim: int, length: int, size: float = 1.0
) -> Case:
    rng = np.random.default_rng(heads * 1000 + head_dim + length)
    keys = (rng.normal(size=(length, head_dim)) * size).astype(np.float32)
    values = rng.normal(size=(length, value_dim)).astype(np.float32)
    blocks = -(-length // PAGE)
    pages = np.full((blocks + 3, page_bytes(kv, head_dim, value_dim)), 0xFF, np.uint8)
    table = rng.permutation(blocks + 3)[:blocks].astype(np.int32)
    for p in range(length):
        KERNELS[isa].kv_store(pages[table[p // PAGE]], p % PAGE, keys[p], values[p], KV_FORMATS.index(kv))
    return Case(
        isa, kv, heads, head_dim, value_dim, length, stored(kv, keys), stored(kv, values), pages, table
    )


def run(
    case: Case, q: Array, first: int, splits: tuple[int, int], window: int = 0, softcap: float = 0
) -> tuple[Array, Array]:
    """q (queries, heads, head_dim) at positions first.. -> unnormalised out and (max, sum)."""
    n = len(q)
    out = aligned((n, case.heads, case.value_dim), fill=np.nan)
    stats = aligned((n, case.heads, 2), fill=np.nan)
    KERNELS[case.isa].attend(
        q.reshape(-1), n, case.heads, case.head_dim, case.value_dim, first, window, *splits, case.pages,
        case.table, case.scale, softcap, out.reshape(-1), stats.reshape(-1), KV_FORMATS.index(case.kv),
    )  # fmt: skip
    return out, stats


def merge(case: Case, out: Array, stats: Array, sinks: Array | None = None) -> Array:
    """(splits, heads, dim) partial states of one query -> normalised output (heads, dim)."""
    y = aligned(case.heads * case.value_dim, fill=np.nan)
    KERNELS[case.isa].attend_merge(
        out.reshape(-1), stats.reshape(-1), len(out), case.heads, case.value_dim, sinks, y
    )
    return y.reshape(case.heads, case.value_dim)


def whole(
    case: Case, q: Array, first: int, window: int = 0, softcap: float = 0, sinks: Array | None = None
) -> Array:
    """All splits in one call, 16 queries at a time."""
    rows = []
    for at in range(0, len(q), 16):
        part = np.ascontiguousarray(q[at : at + 16])
        last = (first + at + len(part) - 1) // SPLIT + 1
        out, stats = run(case, part, first + at, (0, last), window, softcap)
        rows += [merge(case, out[i : i + 1], stats[i : i + 1], sinks) for i in range(len(part))]
    return np.stack(rows)


def by_splits(
    case: Case, q: Array, first: int, window: int = 0, softcap: float = 0, sinks: Array | None = None
) -> Array:
    """One query at a time, one call per split, merged afterwards."""
    rows = []
    for i in range(len(q)):
        parts = [
            run(case, np.ascontiguousarray(q[i : i + 1]), first + i, (s, s + 1), window, softcap)
            for s in range((first + i) // SPLIT + 1)
        ]
        out, stats = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
        rows.append(merge(case, out, stats, sinks))
    return np.stack(rows)


def twin(
    case: Case, q: Array, first: int, window: int = 0, softcap: float = 0, sinks: Array | None = None
) -> Array:
    keys, values = case.keys, case.values
    result = np.zeros((len(q), case.heads, case.value_dim))
    for i, query in enumerate(q.astype(np.float64)):
        own = first + i
        low = max(0, own - window + 1) if window else 0
        scores = query @ keys[low : own + 1].T * case.scale
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        if sinks is not None:
            scores = np.concatenate([scores, sinks[:, None].astype(np.float64)], axis=1)
        e = np.exp(scores - scores.max(axis=1, keepdims=True))
        e /= e.sum(axis=1, keepdims=True)
        result[i] = e[:, : own + 1 - low] @ values[low : own + 1]
    return result


def queries(case: Case, n: int) -> Array:
    return np.random.default_rng(n).normal(size=(n, case.heads, case.head_dim)).astype(np.float32)


def check(
    case: Case, q: Array, first: int, window: int = 0, softcap: float = 0, sinks: Array | None = None
) -> None:
    got = whole(case, q, first, window, softcap, sinks)
    want = twin(case, q, first, window, softcap, sinks)
    assert np.abs(got - want).max() < 4e-6, np.abs(got - want).max()
    assert same_bits(got, by_splits(case, q, first, window, softcap, sinks))


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [1, 3, 4])
def test_head_sizes(isa: str, kv: str, head_dim: int, heads: int) -> None:
    case = make_case(isa, kv, heads, head_dim, head_dim, 150)
    check(case, queries(case, 9), 141)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 7, 8, 16])
@pytest.mark.parametrize("num_queries", [1, 2, 3, 5, 16, 17, 33])
def test_rows(isa: str, kv: str, heads: int, num_queries: int) -> None:
    case = make_case(isa, kv, heads, 64, 64, 100)
    check(case, queries(case, num_queries), 100 - num_queries)


@pytest.mark.parametrize("head_dim,value_dim", [(96, 64), (48, 32), (24, 40), (20, 12), (7, 5)])
def test_unequal_and_odd_sizes(isa: str, kv: str, head_dim: int, value_dim: int) -> None:
    case = make_case(isa, kv, 3, head_dim, value_dim, 90)
    check(case, queries(case, 6), 84)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 200])
def test_lengths(isa: str, kv: str, length: int) -> None:
    case = make_case(isa, kv, 3, 64, 64, length)
    n = min(length, 20)
    check(case, queries(case, n), length - n)


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 63, 64, 65, 100])
@pytest.mark.parametrize("first", [0, 50, 130])
def test_windows(isa: str, kv: str, window: int, first: int) -> None:
    case = make_case(isa, kv, 2, 64, 64, first + 40)
    check(case, queries(case, 40), first, window=window)


def test_pages_before_the_window_are_not_read(isa: str, kv: str) -> None:
    case = make_case(isa, kv, 2, 64, 64, 200)
    q, want = queries(case, 10), None
    want = whole(case, q, 190, window=40)
    case.pages[case.table[: (190 - 39) // PAGE]] = 0xFF
    assert np.isfinite(want).all() and same_bits(want, whole(case, q, 190, window=40))


@pytest.mark.parametrize("softcap", [5.0, 50.0])
def test_softcap(isa: str, kv: str, softcap: float) -> None:
    case = make_case(isa, kv, 3, 64, 64, 100, size=4)
    check(case, queries(case, 7), 93, softcap=softcap)


def test_sinks(isa: str, kv: str) -> None:
    case = make_case(isa, kv, 4, 64, 64, 100)
    for sinks in ([-3, 0, 2, 9], [-200, 200, 0, 1]):
        check(case, queries(case, 5), 95, sinks=np.array(sinks, np.float32))


def test_large_scores(isa: str, kv: str) -> None:
    """Differences far beyond exp's range: all weight on one position, nothing overflows."""
    case = make_case(isa, kv, 3, 64, 64, 140, size=100)
    got = whole(case, queries(case, 5) * 50, 135)
    assert np.isfinite(got).all()
    assert same_bits(got, by_splits(case, queries(case, 5) * 50, 135))


def test_chunks_do_not_matter(isa: str, kv: str) -> None:
    case = make_case(isa, kv, 3, 64, 64, 150)
    q = queries(case, 90)
    want = whole(case, q, 60)
    for step in (1, 3, 7, 16, 40):
        parts = [whole(case, q[at : at + step], 60 + at) for at in range(0, 90, step)]
        assert same_bits(want, np.concatenate(parts)), step


def test_a_split_that_nobody_sees_leaves_the_empty_state(isa: str, kv: str) -> None:
    case = make_case(isa, kv, 2, 64, 64, 200)
    out, stats = run(case, queries(case, 3), 190, (0, 1), window=20)
    assert not out.any() and (stats[..., 0] == np.float32(-1e30)).all() and not stats[..., 1].any()
    y = merge(case, out[:1], stats[:1])
    assert not y.any()


def test_the_cache_and_queries_may_end_at_a_page_without_access(isa: str, kv: str) -> None:
    case = make_case(isa, kv, 3, 80, 80, 64 + 16)
    q, guard = queries(case, 4), Guarded()
    want = whole(case, q, 76)
    order = np.argsort(case.table)
    pages = guard(np.ascontiguousarray(case.pages[np.sort(case.table)]))
    table = np.empty_like(case.table)
    table[order] = np.arange(len(order), dtype=np.int32)
    moved = Case(
        case.isa, case.kv, case.heads, 80, 80, case.length, case.keys, case.values, pages, guard(table)
    )
    assert same_bits(want, whole(moved, guard(q), 76))


def stream_of(dim: int) -> Array:
    """Keys and values (n, 2, dim): borders of fp16, its subnormal numbers, then any bits at all."""
    specials = np.array(
        [
            *(0, -0.0, 1, 65504, 65519.996, 65520, -1e9, np.inf, -np.inf, np.nan),
            *(6e-8, 2.98e-8, 2.9802322e-8, 1e-5, -3e-6, 2.0**-25, 2.0**-25 * 1.0001),
            *(2.0**-14, 2.0**-14 * (1 - 2.0**-11), 1 + 2.0**-11, 1 + 3 * 2.0**-11),
        ],
        np.float32,
    )
    rng = np.random.default_rng(dim)
    bits = rng.integers(0, 2**32, 2000, np.uint32).view(np.float32)
    tiny = (rng.normal(size=40 * dim) * 1e-6).astype(np.float32)
    usual = rng.normal(size=40 * dim).astype(np.float32)
    stream = np.concatenate([specials, bits, np.zeros(dim, np.float32), tiny, usual])
    return stream[: len(stream) // (2 * dim) * 2 * dim].reshape(-1, 2, dim)


@pytest.mark.parametrize("dim", [16, 40, 64, 7])
def test_kv_store(isa: str, kv: str, dim: int) -> None:
    element = np.uint16 if kv == "f16" else np.int8
    for n, (key, value) in enumerate(stream_of(dim)):
        page, slot = np.full(page_bytes(kv, dim, dim), 0xFF, np.uint8), n % PAGE
        KERNELS[isa].kv_store(
            page, slot, np.ascontiguousarray(key), np.ascontiguousarray(value), KV_FORMATS.index(kv)
        )
        size = PAGE * dim * np.dtype(element).itemsize
        keys = page[:size].view(element).reshape(dim, PAGE)
        values = page[size : 2 * size].view(element).reshape(PAGE, dim)
        scales = page[2 * size :].view(np.uint16).reshape(-1, PAGE)
        for found, scale, x in ((keys[:, slot], 0, key), (values[slot], 1, value)):
            if kv == "f16":
                want = clamp(x, HALF_MAX).astype(np.float16).view(np.uint16)
            else:
                codes, wide = q8(x[None])
                want = codes[0]
                assert scales[scale, slot] == wide.view(np.uint16)[0]
            assert np.array_equal(found, want)
        untouched = np.array(0xFF if kv == "q8" else 0xFFFF).astype(element)
        assert (np.delete(keys, slot, axis=1) == untouched).all()
        assert (np.delete(values, slot, axis=0) == untouched).all()
        assert (np.delete(scales, slot, axis=1) == 0xFFFF).all()


def test_what_is_read_back_is_near(isa: str, kv: str) -> None:
    """f16: half a unit in the last place. q8: half a code, and the rounding of the scale."""
    rng = np.random.default_rng(3)
    for size in (1e-2, 1.0, 300.0):
        x = (rng.normal(size=64) * size).astype(np.float32)
        page = np.zeros(page_bytes(kv, 64, 64), np.uint8)
        KERNELS[isa].kv_store(page, 5, x, x, KV_FORMATS.index(kv))
        if kv == "f16":
            read = page.view(np.float16)[: PAGE * 64].reshape(64, PAGE)[:, 5].astype(np.float64)
            bound = np.abs(x) * 2.0**-11
        else:
            scale = page[2 * PAGE * 64 :].view(np.float16)[5].astype(np.float64)
            read = page[: PAGE * 64].view(np.int8).reshape(64, PAGE)[:, 5] * scale
            bound = np.full(64, np.abs(x).max() / 127 * (0.5 + 127 * 2.0**-11))
        assert (np.abs(read - x) <= bound).all()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 1e30, 70000.0])
def test_what_later_positions_hold_changes_no_bit(isa: str, kv: str, bad: float) -> None:
    """Numbers beyond the format at a position that a query does not see: same bits as without them."""
    case = make_case(isa, kv, 3, 64, 64, 40)
    q = queries(case, 10)
    want = whole(case, q, 30)
    key = np.full(64, bad, np.float32)
    for p in (36, 39):
        KERNELS[isa].kv_store(case.pages[case.table[p // PAGE]], p % PAGE, key, key, KV_FORMATS.index(kv))
    got = whole(case, q, 30)
    assert same_bits(got[:6], want[:6]) and np.isfinite(got).all()
    assert not same_bits(got[6:], want[6:])
