"""Which KV block belongs to whom: block numbers, reference counts, tables. The backend owns the bytes.

Every cache group of the plan has its own pool of block numbers and one table per sequence. A block holds
`BLOCK_SIZE` consecutive positions of one sequence; a block with more than one owner is read-only and is
copied before it is written (copy on write), so a prefix can be shared by `fork`. Full blocks are named
(`publish`) and found again by sequences that begin alike (`match`, `attach`); see prefix_cache.py.

Kinds of group:
  full, mla, index   one block per 16 positions, kept until the sequence leaves
  window             blocks whose positions have all left the window are given back; their table entries
                     become 0, which is a valid number that nobody reads. A prefix can be used as long as the
                     blocks of its last window are still there
  state              one block per sequence, whatever its length; it holds the last position only, so plans
                     with such a group have no prefix cache
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from hayai.backends.base import BLOCK_SIZE
from hayai.engine.prefix_cache import BlockNames, BlockPool, TokenChain
from hayai.plan.plan import CacheGroup


def blocks_for(positions: int) -> int:
    """Blocks that hold this many positions."""
    return -(-positions // BLOCK_SIZE)


def _first_read(count: int, window: int) -> int:
    """The first block that is read from position 16 * count on, in a window group."""
    return max(0, count * BLOCK_SIZE - window + 1) // BLOCK_SIZE


class SequenceBlocks:
    """The blocks of one sequence in every group, and its row in the table arrays.

    tables[g][b] is the block of group g that holds positions 16b..16b+15, or -1 when the window has left
    it. The next positions, up to `writable`, have blocks in every group that this sequence alone owns.
    chain: the names of its blocks (None: they are not kept); the first `published` have been announced.
    """

    __slots__ = ("chain", "published", "slot", "tables", "window_start", "writable")

    def __init__(self, slot: int, num_groups: int, chain: TokenChain | None) -> None:
        self.slot = slot
        self.chain = chain
        self.published = 0
        self.tables: list[list[int]] = [[] for _ in range(num_groups)]
        self.window_start: list[int] = [0] * num_groups
        self.writable = 0

    def num_held(self, group: int) -> int:
        """Blocks that this sequence holds in a group."""
        return len(self.tables[group]) - self.window_start[group]


class KvCache:
    """Block tables of all running sequences.

    groups: the plan's cache groups. num_blocks: blocks in each group. max_sequences: sequences open at a
    time. max_context: longest sequence in positions. max_step_tokens: longest chunk of one sequence, which
    bounds what a window group holds. prefix_cache: keep full blocks for sequences to come.
    """

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        num_blocks: int,
        max_sequences: int,
        max_context: int,
        max_step_tokens: int,
        prefix_cache: bool = False,
    ) -> None:
        self.groups = tuple(groups)
        self.keeps_prefixes = prefix_cache and all(group.kind != "state" for group in self.groups)
        self._block_names = BlockNames() if self.keeps_prefixes else None
        self._has_windows = any(group.kind == "window" for group in self.groups)
        self.num_blocks = num_blocks
        self.max_step_tokens = max_step_tokens
        self.pools = [BlockPool(num_blocks) for _ in self.groups]
        width = max(1, blocks_for(max_context))
        self.rows: list[NDArray[np.int32]] = [
            np.zeros((max_sequences, width), dtype=np.int32) for _ in self.groups
        ]
        self.version = 0
        """Grows whenever a table row changes, so that copies of rows know when they are stale."""
        self._free_slots = list(range(max_sequences - 1, -1, -1))
        self._copies: list[list[tuple[int, int]]] = [[] for _ in self.groups]
        self.has_copies = False

    # ------------------------------------------------------------------ what is there

    def has_slot(self) -> bool:
        """Whether one more sequence may be opened."""
        return bool(self._free_slots)

    def used_blocks(self) -> int:
        """Blocks in use in the fullest group."""
        return self.num_blocks - min((pool.available for pool in self.pools), default=self.num_blocks)

    def cached_blocks(self) -> int:
        """Blocks without an owner that are kept for a sequence to come, in the group with the most."""
        return max((len(pool.idle) for pool in self.pools), default=0)

    def num_evictions(self) -> int:
        """Kept blocks that had to make room, in all groups."""
        return sum(pool.num_evictions for pool in self.pools)

    def most_blocks(self, group: int, positions: int) -> int:
        """The most blocks that a sequence grown to `positions` holds at a time in a group."""
        kind, window = self.groups[group].kind, self.groups[group].window
        if kind == "state":
            return 1
        needed = blocks_for(positions)
        if kind == "window":
            # A chunk may begin and end inside a block, and so may the window before it.
            needed = min(needed, blocks_for(window + self.max_step_tokens) + 1)
        return needed

    def capacity(self) -> int:
        """Positions that a sequence can have when it is alone."""
        limits = [len(p.references) * BLOCK_SIZE for p in self.pools]
        for index, group in enumerate(self.groups):
            if group.kind == "state" or (
                group.kind == "window"
                and blocks_for(group.window + self.max_step_tokens) + 1 <= self.num_blocks
            ):
                limits[index] = self.rows[index].shape[1] * BLOCK_SIZE
        return min(limits, default=self.rows[0].shape[1] * BLOCK_SIZE if self.rows else 1 << 30)

    def fits(
        self,
        others: Iterable[tuple[SequenceBlocks, int]],
        positions: int,
        chain: TokenChain | None = None,
        num_shared: int = 0,
        leaving: Iterable[SequenceBlocks] = (),
    ) -> bool:
        """Whether a new sequence of `positions` fits beside `others`, each grown to its own length.

        Blocks that the others have been promised for the rest of their prompts count as used. The first
        `num_shared` blocks of the new one are those of `chain`; they cost nothing where somebody owns them.
        leaving: sequences that would be closed first.
        """
        grown, gone = list(others), list(leaving)
        for index, pool in enumerate(self.pools):
            available = pool.available + sum(
                pool.references[block] == 1 for blocks in gone for block in blocks.tables[index] if block >= 0
            )
            promised = sum(
                max(0, self.most_blocks(index, length) - blocks.num_held(index)) for blocks, length in grown
            )
            needed = self.most_blocks(index, positions)
            if chain is not None and self.groups[index].kind != "window":
                # Window groups give shared blocks back before they take the last of their own.
                owned = 1 if gone else 0  # who owns them may be about to leave: then they count as taken
                names = chain.names[:num_shared]
                needed -= sum(pool.references[pool.index[name]] > owned for name in names)
            if available < promised + needed:
                return False
        return True

    # ------------------------------------------------------------------ prefixes

    def chain(self, tokens: list[int], salt: str) -> TokenChain | None:
        """The names of a sequence's blocks; None where none are kept. `tokens` is its own growing list."""
        return None if self._block_names is None else self._block_names.chain(tokens, salt)

    def match(self, chain: TokenChain, most: int) -> int:
        """How many of the first `most` blocks of a sequence are there in every group that would read them."""
        names = chain.upto(most)
        count = most
        for group, pool in zip(self.groups, self.pools, strict=True):
            if group.kind != "window":
                count = next((i for i in range(count) if names[i] not in pool.index), count)
        lacking = 0
        while count > 0 and lacking >= 0:
            lacking = max(
                (self._last_lacking(index, names, count) for index in range(len(self.groups))), default=-1
            )
            # Every prefix that ends behind the block that lacks would read it as well.
            count = count if lacking < 0 else lacking
        return count

    def _last_lacking(self, index: int, names: list[bytes], count: int) -> int:
        """The last block that a window group would read after `count` blocks and does not have, or -1."""
        group, known = self.groups[index], self.pools[index].index
        if group.kind != "window":
            return -1
        needed = range(_first_read(count, group.window), count)
        return next((i for i in reversed(needed) if names[i] not in known), -1)

    def attach(self, blocks: SequenceBlocks, count: int) -> None:
        """Give a sequence that was just opened the first `count` blocks of its chain, which `match` found."""
        assert blocks.chain is not None and not any(blocks.tables)
        names = blocks.chain.names
        for index, (group, pool) in enumerate(zip(self.groups, self.pools, strict=True)):
            first = _first_read(count, group.window) if group.kind == "window" else 0
            shared = [pool.index[name] for name in names[first:count]]
            for block in shared:
                pool.share(block)
            blocks.tables[index] = [-1] * first + shared
            blocks.window_start[index] = first
            self.rows[index][blocks.slot, :count] = [0] * first + shared
        blocks.published = count
        self.version += 1

    def publish(self, blocks: SequenceBlocks, computed: int) -> None:
        """Name the blocks that are full now that `computed` positions have been computed."""
        count = computed // BLOCK_SIZE
        if blocks.chain is None or count <= blocks.published:
            return
        names = blocks.chain.upto(count)
        for index, pool in enumerate(self.pools):
            table = blocks.tables[index]
            for position in range(max(blocks.published, blocks.window_start[index]), count):
                pool.publish(table[position], names[position])
        blocks.published = count

    # ------------------------------------------------------------------ one sequence

    def open(self, chain: TokenChain | None = None) -> SequenceBlocks:
        """A sequence without blocks. The caller has checked `has_slot`."""
        return SequenceBlocks(self._free_slots.pop(), len(self.groups), chain)

    def close(self, blocks: SequenceBlocks) -> None:
        """Give back everything that the sequence holds."""
        for index, pool in enumerate(self.pools):
            # Last block first: the next sequence gets them back in the old order.
            for block in reversed(blocks.tables[index]):
                if block >= 0:
                    pool.release(block)
            blocks.tables[index].clear()
        self._drop_copies(blocks)
        self._free_slots.append(blocks.slot)
        blocks.writable = 0

    def reserve(self, blocks: SequenceBlocks, start: int, stop: int) -> bool:
        """Make positions start..stop-1 writable: all of it, or nothing and False when blocks lack.

        Nothing before start - window is read again, so window groups give those blocks back first.
        """
        if stop <= blocks.writable:
            return True
        if self._has_windows:
            self.publish(blocks, start)  # before some of them leave
        plans = []
        for index, group in enumerate(self.groups):
            if group.kind == "window":
                self._leave_window(blocks, index, start - group.window + 1)
            first, last = (0, 1) if group.kind == "state" else (start // BLOCK_SIZE, blocks_for(stop))
            table, references = blocks.tables[index], self.pools[index].references
            shared = [b for b in range(first, min(last, len(table))) if references[table[b]] > 1]
            missing = max(0, last - len(table))
            if len(shared) + missing > self.pools[index].available:
                return False
            plans.append((shared, missing))
        for index, (shared, missing) in enumerate(plans):
            self._grow(blocks, index, shared, missing)
        blocks.writable = blocks_for(stop) * BLOCK_SIZE
        self.version += 1
        return True

    def _grow(self, blocks: SequenceBlocks, index: int, shared: list[int], missing: int) -> None:
        pool, table, row = self.pools[index], blocks.tables[index], self.rows[index][blocks.slot]
        for position in shared:
            source, target = table[position], pool.allocate()
            pool.release(source)
            table[position] = row[position] = target
            self._copies[index].append((source, target))
            self.has_copies = True
        for _ in range(missing):
            row[len(table)] = block = pool.allocate()
            table.append(block)

    def _leave_window(self, blocks: SequenceBlocks, index: int, first_read: int) -> None:
        """Release the blocks of a window group that end before position `first_read`."""
        table, row, pool = blocks.tables[index], self.rows[index][blocks.slot], self.pools[index]
        stop = min(max(0, first_read) // BLOCK_SIZE, len(table))
        for position in range(blocks.window_start[index], stop):
            pool.release(table[position])
            table[position], row[position] = -1, 0
        blocks.window_start[index] = max(blocks.window_start[index], stop)

    def fork(self, parent: SequenceBlocks, length: int) -> SequenceBlocks:
        """A sequence that shares the first `length` positions with `parent`; both copy before they write.

        The caller has checked `has_slot`. `length` is what the parent has computed: state and window groups
        hold nothing older.
        """
        child = self.open()
        for index, group in enumerate(self.groups):
            count = 1 if group.kind == "state" else blocks_for(length)
            shared = parent.tables[index][:count]
            for block in shared:
                if block >= 0:
                    self.pools[index].share(block)
            child.tables[index] = shared
            child.window_start[index] = min(parent.window_start[index], len(shared))
            self.rows[index][child.slot, : len(shared)] = [max(b, 0) for b in shared]
        # The next write of either goes through reserve(), which sees the shared blocks.
        child.writable = 0
        parent.writable = 0
        self.version += 1
        return child

    # ------------------------------------------------------------------ copies

    def take_copies(self) -> list[tuple[str, NDArray[np.int32], NDArray[np.int32]]]:
        """Copies (group, sources, targets) that have to be made before the next step runs."""
        if not self.has_copies:
            return []
        taken = []
        for index, pairs in enumerate(self._copies):
            if pairs:
                both = np.array(pairs, dtype=np.int32)
                taken.append(
                    (
                        self.groups[index].name,
                        np.ascontiguousarray(both[:, 0]),
                        np.ascontiguousarray(both[:, 1]),
                    )
                )
                pairs.clear()
        self.has_copies = False
        return taken

    def _drop_copies(self, blocks: SequenceBlocks) -> None:
        """Forget copies into blocks that nobody owns any more (their owner left before the step ran)."""
        if not self.has_copies:
            return
        for index, pairs in enumerate(self._copies):
            references = self.pools[index].references
            self._copies[index] = [(s, t) for s, t in pairs if references[t] > 0]
        self.has_copies = any(self._copies)

    # ------------------------------------------------------------------ proof

    def check_integrity(self, open_blocks: Iterable[SequenceBlocks]) -> None:
        """Every count, table and row agrees with who holds what; AssertionError says what does not."""
        owners = list(open_blocks)
        slots = [blocks.slot for blocks in owners]
        assert sorted(slots + self._free_slots) == list(range(len(slots) + len(self._free_slots))), (
            "slots lost or held twice"
        )
        for index, (group, pool) in enumerate(zip(self.groups, self.pools, strict=True)):
            held = Counter(b for blocks in owners for b in blocks.tables[index] if b >= 0)
            for block, count in enumerate(pool.references):
                assert held[block] == count, (
                    f"{group.name}: block {block} has {held[block]} owners, not {count}"
                )
            pool.check_integrity(group.name)
            for blocks in owners:
                table = blocks.tables[index]
                row = self.rows[index][blocks.slot, : len(table)].tolist()
                assert row == [max(b, 0) for b in table], f"{group.name}: row of slot {blocks.slot}"
                left = blocks.window_start[index]
                assert all(b == -1 for b in table[:left]) and all(b >= 0 for b in table[left:]), (
                    f"{group.name}: window of slot {blocks.slot}"
                )
                for block, name in zip(
                    table, () if blocks.chain is None else blocks.chain.names, strict=False
                ):
                    assert block < 0 or pool.names[block] in (None, name), (
                        f"{group.name}: block {block} has another sequence's name"
                    )
