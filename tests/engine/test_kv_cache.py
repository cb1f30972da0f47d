"""Block tables: allocation, sharing, copy on write, windows; the books are in order after any calls."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_fakes import FULL, STATE, WINDOW
from hayai.backends.base import BLOCK_SIZE
from hayai.engine.kv_cache import KvCache, SequenceBlocks
from hayai.plan.plan import CacheGroup


def cache_of(*groups: CacheGroup, num_blocks: int = 8, max_sequences: int = 4) -> KvCache:
    return KvCache(groups, num_blocks, max_sequences, max_context=256, max_step_tokens=32)


def test_blocks_come_as_positions_need_them() -> None:
    cache = cache_of(FULL)
    blocks = cache.open()
    assert cache.reserve(blocks, 0, 1)
    assert blocks.tables == [[0]]
    assert cache.reserve(blocks, 1, 16) and cache.used_blocks() == 1
    assert cache.reserve(blocks, 16, 33) and blocks.tables == [[0, 1, 2]]
    assert cache.rows[0][blocks.slot, :3].tolist() == [0, 1, 2]
    cache.check_integrity([blocks])
    cache.close(blocks)
    assert cache.used_blocks() == 0
    cache.check_integrity([])


def test_reserve_takes_all_or_nothing() -> None:
    cache = cache_of(FULL, num_blocks=3)
    first, second = cache.open(), cache.open()
    assert cache.reserve(first, 0, 32)
    assert not cache.reserve(second, 0, 17)
    assert second.tables == [[]] and cache.used_blocks() == 2
    assert cache.reserve(second, 0, 16)
    assert not cache.reserve(first, 32, 33)
    cache.check_integrity([first, second])


def test_freed_blocks_are_used_again_first() -> None:
    """Memory that was never touched stays untouched as long as there is other."""
    cache = cache_of(FULL)
    for _ in range(5):
        blocks = cache.open()
        assert cache.reserve(blocks, 0, 40)
        assert blocks.tables == [[0, 1, 2]]
        cache.close(blocks)


def test_a_fork_shares_and_the_writer_copies() -> None:
    cache = cache_of(FULL)
    parent = cache.open()
    cache.reserve(parent, 0, 40)
    child = cache.fork(parent, 40)
    assert child.tables == parent.tables == [[0, 1, 2]]
    assert cache.used_blocks() == 3
    assert cache.reserve(child, 40, 41)
    assert child.tables == [[0, 1, 3]] and parent.tables == [[0, 1, 2]]
    copies = cache.take_copies()
    assert [(g, s.tolist(), t.tolist()) for g, s, t in copies] == [("kv", [2], [3])]
    assert cache.take_copies() == []
    # The parent is the only owner of its last block again and writes without a copy.
    assert cache.reserve(parent, 40, 41) and parent.tables == [[0, 1, 2]] and cache.take_copies() == []
    cache.check_integrity([parent, child])
    cache.close(parent)
    cache.check_integrity([child])
    assert cache.used_blocks() == 3
    cache.close(child)
    assert cache.used_blocks() == 0


def test_a_fork_at_a_block_border_copies_nothing() -> None:
    cache = cache_of(FULL)
    parent = cache.open()
    cache.reserve(parent, 0, 32)
    child = cache.fork(parent, 32)
    assert cache.reserve(child, 32, 33) and cache.reserve(parent, 32, 33)
    assert cache.take_copies() == []
    assert child.tables[0][:2] == parent.tables[0][:2] and child.tables[0][2] != parent.tables[0][2]


def test_copies_for_a_sequence_that_left_are_forgotten() -> None:
    cache = cache_of(FULL)
    parent = cache.open()
    cache.reserve(parent, 0, 20)
    child = cache.fork(parent, 20)
    cache.reserve(child, 20, 21)
    cache.close(child)
    assert cache.take_copies() == []


def test_a_window_group_gives_back_what_it_left() -> None:
    cache = cache_of(FULL, WINDOW, num_blocks=16)
    blocks = cache.open()
    for position in range(256):
        assert cache.reserve(blocks, position, position + 1)
        read_from = max(0, position - WINDOW.window + 1)
        kept = blocks.tables[1][read_from // BLOCK_SIZE :]
        assert all(block >= 0 for block in kept), "a block inside the window is gone"
        assert blocks.num_held(1) <= cache.most_blocks(1, position + 1)
        cache.check_integrity([blocks])
    assert blocks.num_held(0) == 16 and blocks.num_held(1) <= 3
    cache.close(blocks)
    cache.check_integrity([])


def test_a_state_group_holds_one_block() -> None:
    cache = cache_of(STATE)
    parent = cache.open()
    for position in range(0, 100, 10):
        assert cache.reserve(parent, position, position + 10)
    assert parent.tables == [[0]]
    child = cache.fork(parent, 100)
    assert cache.reserve(child, 100, 101)
    assert [(g, s.tolist(), t.tolist()) for g, s, t in cache.take_copies()] == [("state", [0], [1])]
    cache.check_integrity([parent, child])


@pytest.mark.parametrize(
    ("groups", "blocks", "capacity"),
    [
        ((FULL,), 4, 64),
        ((FULL, STATE), 4, 64),
        ((STATE,), 1, 256),
        ((WINDOW,), 16, 256),
        ((WINDOW,), 2, 32),
        ((FULL, WINDOW), 5, 80),
    ],
)
def test_capacity_of_a_lone_sequence(groups: tuple[CacheGroup, ...], blocks: int, capacity: int) -> None:
    cache = cache_of(*groups, num_blocks=blocks)
    assert cache.capacity() == capacity
    sequence = cache.open()
    assert all(cache.reserve(sequence, p, p + 1) for p in range(capacity))


def test_fits_counts_what_was_promised() -> None:
    cache = cache_of(FULL, num_blocks=8)
    running = cache.open()
    cache.reserve(running, 0, 16)
    assert cache.fits([], 7 * 16)
    assert not cache.fits([], 7 * 16 + 1)
    assert cache.fits([(running, 64)], 64)  # three more blocks for the running one, four for the new one
    assert not cache.fits([(running, 65)], 64)


def test_integrity_check_finds_what_is_wrong() -> None:
    cache = cache_of(FULL)
    blocks = cache.open()
    cache.reserve(blocks, 0, 20)
    with pytest.raises(AssertionError, match="slots"):
        cache.check_integrity([])
    cache.rows[0][blocks.slot, 1] = 7
    with pytest.raises(AssertionError, match="row"):
        cache.check_integrity([blocks])
    cache.rows[0][blocks.slot, 1] = 1
    cache.pools[0].references[1] = 2
    with pytest.raises(AssertionError, match="owners"):
        cache.check_integrity([blocks])


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["open", "grow", "fork", "close"]), st.integers(0, 3), st.integers(1, 20)),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(OPERATIONS, st.integers(2, 10))
def test_content_survives_any_sequence_of_calls(
    operations: list[tuple[str, int, int]], num_blocks: int
) -> None:
    """Each sequence reads back exactly what it and its ancestors wrote, whatever is shared and copied."""
    groups = (FULL, WINDOW, STATE)
    cache = cache_of(*groups, num_blocks=num_blocks)
    memory = [np.full((num_blocks, BLOCK_SIZE), -1) for _ in groups]
    live: list[tuple[SequenceBlocks, list[int]]] = []
    stamp = 0
    for name, which, amount in operations:
        if name == "open" and cache.has_slot():
            live.append((cache.open(), []))
        elif live and name == "close":
            cache.close(live.pop(which % len(live))[0])
        elif live and name == "fork" and cache.has_slot():
            parent, past = live[which % len(live)]
            if past:
                live.append((cache.fork(parent, len(past)), list(past)))
        elif live and name == "grow":
            blocks, past = live[which % len(live)]
            start, stop = len(past), len(past) + amount
            if stop <= 256 and cache.reserve(blocks, start, stop):
                for group, sources, targets in cache.take_copies():
                    cells = memory[[g.name for g in groups].index(group)]
                    cells[targets] = cells[sources]
                for position in range(start, stop):
                    stamp += 1
                    past.append(stamp)
                    for index in (0, 1):
                        block = blocks.tables[index][position // BLOCK_SIZE]
                        memory[index][block, position % BLOCK_SIZE] = stamp
                    memory[2][blocks.tables[2][0], 0] = stamp
        cache.check_integrity(blocks for blocks, _ in live)
        for blocks, past in live:
            _check_content(blocks, past, memory)
    for blocks, _ in live:
        cache.close(blocks)
    cache.check_integrity([])
    assert cache.used_blocks() == 0


def _check_content(blocks: SequenceBlocks, past: list[int], memory: list[np.ndarray]) -> None:
    if not past:
        return
    for index, first in ((0, 0), (1, max(0, len(past) - WINDOW.window + 1))):
        for position in range(first, len(past)):
            block = blocks.tables[index][position // BLOCK_SIZE]
            assert memory[index][block, position % BLOCK_SIZE] == past[position]
    assert memory[2][blocks.tables[2][0], 0] == past[-1]
