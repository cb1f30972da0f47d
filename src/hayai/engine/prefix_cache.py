"""Blocks that outlive their sequence, found again by what they hold.

A full block is named by a hash chain: name(i) = H(name(i-1), tokens 16i..16i+15), name(-1) = H(salt). Equal
names mean equal salt and equal tokens from the very start, and by the determinism contract equal keys and
values, so such a block can be shared without looking at it.

H is blake2b with 256 bits, keyed with random bytes of this process. The tokens of a block are not compared
again: tenants choose their prompts, but finding two prompts of one name takes 2^128 hashes under a key that
nobody is told, and never happens by chance. A trie that compares the tokens themselves was weighed; it costs
Python more per block (a 16-tuple hashed and compared) than the microsecond of a digest, and its dictionary
can be slowed down by chosen collisions of Python's unkeyed integer hash.

A salt separates tenants: what one has cached is never found by another, nor seen by timing.
"""

from __future__ import annotations

import os
import struct
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from hayai.backends.base import BLOCK_SIZE

if TYPE_CHECKING:
    from hashlib import blake2b

NAME_BYTES = 32
_PACK = struct.Struct(f"<{BLOCK_SIZE}i").pack


class BlockNames:
    """Makes the chains of one cache; see the module."""

    __slots__ = ("_name_block", "_name_salt")

    def __init__(self) -> None:
        from hashlib import (
            blake2b,
        )  # brings 3 MB of OpenSSL along, which one run of one prompt has no use for

        named = partial(blake2b, digest_size=NAME_BYTES, key=os.urandom(NAME_BYTES))
        self._name_salt = partial(named, person=b"salt")
        self._name_block = partial(named, person=b"block")

    def chain(self, tokens: list[int], salt: str) -> TokenChain:
        """The chain of a sequence. `tokens` is the sequence's own list and may grow at its end."""
        return TokenChain(tokens, self._name_salt(salt.encode()).digest(), self._name_block)


class TokenChain:
    """The names of one sequence's full blocks, computed when they are asked for."""

    __slots__ = ("_name_block", "_root", "_tokens", "names")

    def __init__(self, tokens: list[int], root: bytes, name_block: Callable[[bytes], blake2b]) -> None:
        self._tokens = tokens
        self._root = root
        self._name_block = name_block
        self.names: list[bytes] = []

    def upto(self, count: int) -> list[bytes]:
        """The names so far, at least the first `count`: the tokens of all of them are known."""
        names, tokens = self.names, self._tokens
        while len(names) < count:
            at = len(names) * BLOCK_SIZE
            before = names[-1] if names else self._root
            block = before + _PACK(*tokens[at : at + BLOCK_SIZE])
            names.append(self._name_block(block).digest())
        return names


class BlockPool:
    """Numbers 0..num_blocks-1 of one cache group: reference counts, names, and who is evicted next.

    free: unnamed blocks without an owner; a stack that starts with the low numbers on top, so blocks are used
    again soon after they are freed and memory that a backend touches lazily is touched only as far as needed.
    idle: named blocks without an owner, least recently used first. They are taken only when `free` is empty.
    """

    __slots__ = ("free", "idle", "index", "names", "num_evictions", "references")

    def __init__(self, num_blocks: int) -> None:
        self.free: list[int] = list(range(num_blocks - 1, -1, -1))
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.references: list[int] = [0] * num_blocks
        self.names: list[bytes | None] = [None] * num_blocks
        self.index: dict[bytes, int] = {}
        self.num_evictions = 0

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self.free) + len(self.idle)

    def allocate(self) -> int:
        """A block with one owner. The caller has checked that one is available."""
        if self.free:
            block = self.free.pop()
        else:
            block, _ = self.idle.popitem(last=False)
            name = self.names[block]
            assert name is not None
            del self.index[name]
            self.names[block] = None
            self.num_evictions += 1
        self.references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more owner of a block that has one already, or that is kept for its name."""
        if self.references[block] == 0:
            assert self.names[block] is not None, f"block {block} is free"
            del self.idle[block]
        self.references[block] += 1

    def release(self, block: int) -> None:
        """One owner less; after the last one a named block is kept as the most recently used."""
        count = self.references[block] - 1
        assert count >= 0, f"block {block} released twice"
        self.references[block] = count
        if count == 0:
            if self.names[block] is None:
                self.free.append(block)
            else:
                self.idle[block] = None

    def publish(self, block: int, name: bytes) -> None:
        """Name a block that is full and will not be written again.

        Where another block has that name already (two sequences computed the same at once), this one stays
        unnamed and is freed with its owner.
        """
        known = self.index.setdefault(name, block)
        if known == block:
            self.names[block] = name
        elif self.references[known] == 0:
            self.idle.move_to_end(known)  # it was wanted just now

    def check_integrity(self, where: str) -> None:
        """Free, idle and owned blocks are all blocks, once each; names and index agree."""
        free = set(self.free)
        assert len(free) == len(self.free), f"{where}: a block is free twice"
        assert not free & self.idle.keys(), f"{where}: a block is free and idle"
        unowned = {b for b, count in enumerate(self.references) if count == 0}
        assert free | self.idle.keys() == unowned, f"{where}: free list"
        named = {b: name for b, name in enumerate(self.names) if name is not None}
        assert self.idle.keys() == named.keys() & unowned, (
            f"{where}: an unnamed block is idle, or a named one free"
        )
        assert {name: b for b, name in named.items()} == self.index, f"{where}: index of names"
