"""Which KV block belongs to whom: block numbers, reference counts, tables. The backend owns the bytes.

Every cache group of the plan has its own pool of block numbers and one table per sequence. A block holds
`BLOCK_SIZE` consecutive positions of one sequence; a block with more than one owner is read-only and is
copied before it is written (copy on write), so a prefix can be shared by `fork`.

Kinds of group:
  full, mla, index   one block per 16 positions, kept until the sequence leaves
  window             blocks whose positions have all left the window are given back; their table entries
                     become 0, which is a valid number that nobody reads
  state              one block per sequence, whatever its length
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from hayai.backends.base import BLOCK_SIZE
from hayai.plan.plan import CacheGroup


def blocks_for(positions: int) -> int:
    """Blocks that hold this many positions."""
    return -(-positions // BLOCK_SIZE)


class BlockPool:
    """Numbers 0..num_blocks-1 with reference counts.

    The free list is a stack that starts with the low numbers on top: blocks are used again soon after they
    are freed, so memory that a backend touches lazily is touched only as far as it is needed.
    """

    __slots__ = ("free", "references")

    def __init__(self, num_blocks: int) -> None:
        self.free: list[int] = list(range(num_blocks - 1, -1, -1))
        self.references: list[int] = [0] * num_blocks

    def allocate(self) -> int:
        """A block with one owner. The caller has checked that one is free."""
        block = self.free.pop()
        self.references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more owner of a block that has one already."""
        assert self.references[block] > 0, f"block {block} is free"
        self.references[block] += 1

    def release(self, block: int) -> None:
        """One owner less; the last one frees the block."""
        count = self.references[block] - 1
        assert count >= 0, f"block {block} released twice"
        self.references[block] = count
        if count == 0:
            self.free.append(block)


class SequenceBlocks:
    """The blocks of one sequence in every group, and its row in the table arrays.

    tables[g][b] is the block of group g that holds positions 16b..16b+15, or -1 when the window has left
    it. The next positions, up to `writable`, have blocks in every group that this sequence alone owns.
    """

    __slots__ = ("slot", "tables", "window_start", "writable")

    def __init__(self, slot: int, num_groups: int) -> None:
        self.slot = slot
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
    bounds what a window group holds.
    """

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        num_blocks: int,
        max_sequences: int,
        max_context: int,
        max_step_tokens: int,
    ) -> None:
        self.groups = tuple(groups)
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
        return self.num_blocks - min((len(p.free) for p in self.pools), default=self.num_blocks)

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

    def fits(self, others: Iterable[tuple[SequenceBlocks, int]], positions: int) -> bool:
        """Whether a new sequence of `positions` fits beside `others`, each grown to its own length.

        Blocks that the others have been promised for the rest of their prompts count as used.
        """
        grown = list(others)
        for index, pool in enumerate(self.pools):
            promised = sum(
                max(0, self.most_blocks(index, length) - blocks.num_held(index)) for blocks, length in grown
            )
            if len(pool.free) < promised + self.most_blocks(index, positions):
                return False
        return True

    # ------------------------------------------------------------------ one sequence

    def open(self) -> SequenceBlocks:
        """A sequence without blocks. The caller has checked `has_slot`."""
        return SequenceBlocks(self._free_slots.pop(), len(self.groups))

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
        plans = []
        for index, group in enumerate(self.groups):
            if group.kind == "window":
                self._leave_window(blocks, index, start - group.window + 1)
            first, last = (0, 1) if group.kind == "state" else (start // BLOCK_SIZE, blocks_for(stop))
            table, references = blocks.tables[index], self.pools[index].references
            shared = [b for b in range(first, min(last, len(table))) if references[table[b]] > 1]
            missing = max(0, last - len(table))
            if len(shared) + missing > len(self.pools[index].free):
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
            free = set(pool.free)
            assert len(free) == len(pool.free), f"{group.name}: a block is free twice"
            assert free == {b for b, c in enumerate(pool.references) if c == 0}, f"{group.name}: free list"
            for blocks in owners:
                table = blocks.tables[index]
                row = self.rows[index][blocks.slot, : len(table)].tolist()
                assert row == [max(b, 0) for b in table], f"{group.name}: row of slot {blocks.slot}"
                left = blocks.window_start[index]
                assert all(b == -1 for b in table[:left]) and all(b >= 0 for b in table[left:]), (
                    f"{group.name}: window of slot {blocks.slot}"
                )
