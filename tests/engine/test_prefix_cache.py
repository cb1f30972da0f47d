"""The prefix cache: what is found again, what never is, what is evicted; tokens are those of a cold cache."""

from __future__ import annotations

import pytest

from engine_fakes import FULL, INDEX, LATENT, STATE, WINDOW, alone, drain, make_engine, request, tokens_of
from hayai.backends.base import BLOCK_SIZE
from hayai.engine.engine import Engine
from hayai.engine.kv_cache import KvCache
from hayai.engine.prefix_cache import BlockNames, BlockPool

PAGES = [10 + i * 7 % 300 for i in range(100)]


def run(engine: Engine, name: str, prompt: list[int], max_tokens: int = 5, **options: object) -> int:
    """Run one request to its end; how many of its prompt tokens were found. Checks its tokens."""
    engine.add(request(name, prompt, max_tokens=max_tokens, **options))
    events = drain(engine)
    assert tokens_of(events, name) == alone(prompt, max_tokens)
    timing = events[-1].timing
    assert timing is not None and timing.prompt_tokens == len(prompt)
    return timing.cached_tokens


# ---------------------------------------------------------------- names


def test_a_name_stands_for_salt_and_all_tokens_before() -> None:
    names = BlockNames()
    chain = names.chain(PAGES, "")
    assert len(set(chain.upto(6))) == 6 and chain.upto(3)[:3] == chain.names[:3]
    assert names.chain(list(PAGES), "").upto(6) == chain.names
    assert not set(names.chain(PAGES, "other").upto(6)) & set(chain.names)
    changed = [*PAGES[:20], 9, *PAGES[21:]]
    other = names.chain(changed, "").upto(6)
    assert other[0] == chain.names[0] and not set(other[1:]) & set(chain.names)
    repeated = names.chain([5] * 64, "").upto(4)
    assert len(set(repeated)) == 4, "the same tokens at another place have another name"


def test_names_of_two_processes_differ() -> None:
    """The key is random: nobody can look for collisions ahead."""
    assert BlockNames().chain(PAGES, "").upto(1) != BlockNames().chain(PAGES, "").upto(1)


def test_tokens_that_come_later_extend_the_chain() -> None:
    names = BlockNames()
    tokens = PAGES[:16]
    chain = names.chain(tokens, "")
    first = list(chain.upto(1))
    tokens += PAGES[16:40]
    assert chain.upto(2) == names.chain(PAGES, "").upto(2) and chain.names[:1] == first


def test_the_pool_evicts_the_least_recently_used_and_only_when_nothing_is_free() -> None:
    pool = BlockPool(3)
    blocks = [pool.allocate() for _ in range(2)]
    for block in blocks:
        pool.publish(block, bytes([block]))
        pool.release(block)
    assert pool.allocate() == 2 and pool.num_evictions == 0
    pool.share(0)
    pool.release(0)  # used again: now 1 is the older one
    assert pool.allocate() == 1 and pool.num_evictions == 1 and pool.index == {b"\0": 0}
    pool.check_integrity("pool")
    pool.release(1)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(1)
    with pytest.raises(AssertionError, match="is free"):
        pool.share(1)


def test_a_block_that_is_computed_twice_is_kept_once() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(), pool.allocate()
    pool.publish(first, b"name")
    pool.publish(second, b"name")
    pool.release(first)
    pool.release(second)
    pool.check_integrity("pool")
    assert list(pool.idle) == [first] and second in pool.free


# ---------------------------------------------------------------- requests


def test_a_second_request_computes_only_what_is_new() -> None:
    engine, runner = make_engine(max_tokens=128)
    assert run(engine, "cold", PAGES) == 0
    runner.steps.clear()
    assert run(engine, "warm", [*PAGES, 7, 8, 9]) == 96
    assert runner.steps[0] == (1, 7)
    stats = engine.stats()
    assert (stats.prefix_queried_tokens, stats.prefix_cached_tokens) == (203, 96)
    assert stats.kv_blocks_used == 0 and stats.kv_blocks_cached > 0


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    engine, runner = make_engine(max_tokens=128)
    run(engine, "cold", PAGES[:64])
    runner.steps.clear()
    assert run(engine, "warm", PAGES[:64]) == 48
    assert runner.steps[0] == (1, 16)


def test_output_is_found_by_the_next_turn() -> None:
    engine, _ = make_engine(max_tokens=128)
    run(engine, "first", PAGES[:20], 60)
    conversation = [*PAGES[:20], *alone(PAGES[:20], 60), 5, 6, 7]
    assert run(engine, "second", conversation) == 64  # 79 computed positions: four whole blocks


def test_a_salt_hides_a_prefix() -> None:
    engine, _ = make_engine(max_tokens=128)
    run(engine, "cold", PAGES, cache_salt="tenant a")
    assert run(engine, "other", PAGES, cache_salt="tenant b") == 0
    assert run(engine, "nobody", PAGES) == 0
    assert run(engine, "same", PAGES, cache_salt="tenant a") == 96


def test_without_the_cache_nothing_is_kept() -> None:
    engine, _ = make_engine(max_tokens=128, prefix_cache=False)
    assert not engine.keeps_prefixes
    run(engine, "a", PAGES)
    assert run(engine, "b", PAGES) == 0
    assert engine.stats().kv_blocks_cached == 0 and engine.stats().prefix_queried_tokens == 0


def test_aborted_and_preempted_sequences_leave_their_blocks() -> None:
    engine, _ = make_engine(max_tokens=32, num_blocks=200)
    engine.add(request("a", PAGES, max_tokens=5))
    engine.step()
    engine.step()
    engine.abort("a")
    engine.step()
    assert run(engine, "b", PAGES) == 64

    engine, runner = make_engine(max_tokens=128, num_blocks=16)
    for i, name in enumerate("ab"):
        engine.add(request(name, [30 * i + p % 100 for p in PAGES[:20]], max_tokens=110))
    while not engine.stats().num_preemptions:
        engine.step()
    recomputed = [s.request_id for s in engine.scheduler.waiting]
    runner.steps.clear()
    events = drain(engine)
    assert recomputed == ["b"] and max(tokens for _, tokens in runner.steps) <= 32, "most of it was kept"
    last = next(e for e in events if e.request_id == "b" and e.finish_reason)
    assert last.timing is not None and last.timing.num_preemptions >= 1 and last.timing.cached_tokens == 0


def test_kept_blocks_make_room_for_new_ones() -> None:
    engine, _ = make_engine(max_tokens=128, num_blocks=16)
    for first in range(40, 60):
        assert run(engine, f"r{first}", [first] * 100, 10) == 0
    stats = engine.stats()
    assert stats.kv_evictions > 50 and stats.kv_blocks_cached <= 16
    assert run(engine, "again", [59] * 100) == 96
    assert run(engine, "long ago", [41] * 100) == 0


def test_a_suffix_is_evicted_before_its_prefix() -> None:
    engine, _ = make_engine(max_tokens=256, num_blocks=10)
    run(engine, "cold", PAGES[:96], 1)
    run(engine, "other", [400] * 70, 1)  # takes the four free blocks and one of those kept
    assert run(engine, "again", PAGES[:96], 1) == 80


# ---------------------------------------------------------------- kinds of caches


def test_several_full_groups_share_together() -> None:
    engine, _ = make_engine(LATENT, INDEX, max_tokens=128)
    assert run(engine, "a", PAGES) == 0 and run(engine, "b", PAGES) == 96


def test_a_window_group_needs_its_last_window_only() -> None:
    engine, _ = make_engine(FULL, WINDOW, max_tokens=128)
    run(engine, "a", PAGES)
    assert run(engine, "b", PAGES) == 96
    # Its early blocks left the window long ago; they are the first to be evicted and nobody misses them.
    cache = engine.cache
    names = cache.chain(list(PAGES), "")
    assert names is not None
    pool = cache.pools[1]
    for name in cache._block_names.chain(list(PAGES), "").upto(6)[:4]:
        block = pool.index.pop(name)
        pool.names[block] = None
        del pool.idle[block]
        pool.free.append(block)
    cache.check_integrity([])
    assert run(engine, "c", PAGES) == 96, "blocks 4 and 5 hold the window before position 96"
    assert run(engine, "d", PAGES[:60]) == 0, "its window would be in blocks 1 and 2"


def test_a_window_that_lacks_a_block_shortens_the_prefix() -> None:
    cache = KvCache((FULL, WINDOW), 16, 2, 256, 32, prefix_cache=True)
    chain = cache.chain(list(PAGES), "")
    blocks = cache.open(chain)
    for start in range(0, 96, 16):
        assert cache.reserve(blocks, start, start + 16)
        cache.publish(blocks, start + 16)
    cache.close(blocks)
    assert chain is not None and cache.match(chain, 6) == 6
    pool = cache.pools[1]
    block = pool.index.pop(chain.names[4])
    pool.names[block] = None
    del pool.idle[block]
    pool.free.append(block)
    assert cache.match(chain, 6) == 4, "after 5 and 6 blocks the window holds block 4"


def test_plans_with_states_keep_nothing() -> None:
    engine, _ = make_engine(FULL, STATE, max_tokens=128)
    assert not engine.keeps_prefixes
    run(engine, "a", PAGES)
    assert run(engine, "b", PAGES) == 0


# ---------------------------------------------------------------- requests that come together


def test_choices_of_one_prompt_compute_it_once() -> None:
    engine, runner = make_engine(max_tokens=64, num_blocks=64)
    for i in range(4):
        engine.add(request(f"r{i}", PAGES, max_tokens=6, temperature=0.0))
    events = drain(engine)
    assert all(tokens_of(events, f"r{i}") == alone(PAGES, 6) for i in range(4))
    run_tokens = sum(tokens for _, tokens in runner.steps)
    assert run_tokens <= len(PAGES) + 3 * (len(PAGES) - 96) + 4 * 5
    cached = [e.timing.cached_tokens for e in events if e.finish_reason and e.timing]
    assert sorted(cached) == [0, 96, 96, 96]


def test_a_common_beginning_is_computed_once() -> None:
    engine, runner = make_engine(max_tokens=32)
    for i in range(3):
        engine.add(request(f"r{i}", [*PAGES[:64], *[100 + i] * 20], max_tokens=3))
    events = drain(engine)
    for i in range(3):
        assert tokens_of(events, f"r{i}") == alone([*PAGES[:64], *[100 + i] * 20], 3)
    assert sum(tokens for _, tokens in runner.steps) <= 64 + 3 * (20 + 3)


def test_nobody_waits_for_a_prefix_of_somebody_less_urgent() -> None:
    engine, _ = make_engine(max_tokens=32, max_sequences=4)
    engine.add(request("batch", PAGES, max_tokens=3, priority=10))
    engine.step()
    engine.add(request("urgent", PAGES, max_tokens=3, priority=0))
    events = drain(engine)
    assert [e.request_id for e in events if e.finish_reason] == ["urgent", "batch"]
    assert tokens_of(events, "urgent") == tokens_of(events, "batch") == alone(PAGES, 3)


def test_who_waits_for_a_prefix_goes_on_when_its_maker_leaves() -> None:
    engine, _ = make_engine(max_tokens=16, max_sequences=4)
    engine.add(request("maker", PAGES, max_tokens=3))
    engine.add(request("waits", PAGES, max_tokens=3))
    engine.step()
    assert [s.request_id for s in engine.scheduler.waiting] == ["waits"]
    engine.abort("maker")
    events = drain(engine)
    assert tokens_of(events, "waits") == alone(PAGES, 3)
    timing = events[-1].timing
    assert timing is not None and timing.cached_tokens == BLOCK_SIZE
