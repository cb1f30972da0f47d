"""From a batch of sequences to the arrays of one step.

While the same sequences decode on, the arrays and the StepInput of the last step are used again and only
their content changes: a step is synchronous, so nobody reads them any more. (A mask is one array that its
grammar fills again and again.) For one sequence the block table is a view of the cache's own row and never
copied.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hayai.backends.base import SamplingRow, StepInput, TokenHistory
from hayai.engine.kv_cache import KvCache
from hayai.engine.scheduler import Batch
from hayai.engine.sequence import Sequence


class StepBuilder:
    """Builds the StepInput of each batch; keeps that of the last one."""

    def __init__(self, cache: KvCache) -> None:
        self._cache = cache
        self._batch: Batch | None = None
        # Token and position of a lone decoding sequence. Writing them through memoryviews costs half of what
        # it costs through numpy when a step has just swept the caches.
        self._lone: Batch | None = None
        self._token = self._position = np.zeros(1, np.int32).data
        self._version = -1
        self._slots: list[int] = []
        self._has_histories = False

    def build(self, batch: Batch) -> None:
        """Set `batch.step`."""
        if batch is self._lone:
            sequence = batch.sequences[0]
            self._token[0] = sequence.tokens[-1]
            self._position[0] = sequence.num_computed
        elif batch is self._batch:
            self._refresh(batch)
        else:
            batch.step = step = self._fresh(batch)
            self._batch = batch if batch.decode_only else None
            self._lone = None
            if batch.decode_only and len(batch.sequences) == 1 and not self._has_histories:
                self._lone = batch
                self._token, self._position = step.token_ids.data, step.positions.data

    def _refresh(self, batch: Batch) -> None:
        step = batch.step
        assert step is not None
        sequences = batch.sequences
        step.token_ids[:] = [s.tokens[-1] for s in sequences]
        step.positions[:] = [s.num_computed for s in sequences]
        if self._version != self._cache.version and len(sequences) > 1:
            for group, rows in zip(self._cache.groups, self._cache.rows, strict=True):
                np.take(rows, self._slots, axis=0, out=step.block_tables[group.name])
            self._version = self._cache.version
        if self._has_histories:
            batch.step = replace(step, histories=_histories(batch.samplers))

    def _fresh(self, batch: Batch) -> StepInput:
        token_ids: list[int] = []
        positions: list[int] = []
        query_start = [0]
        rows = _Rows()
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            start, first = sequence.num_computed, len(token_ids)
            token_ids += sequence.tokens[start : start + count]
            positions += range(start, start + count)
            query_start.append(len(token_ids))
            rows.add(sequence, start, count, first)
        self._slots = [s.blocks.slot for s in batch.sequences if s.blocks is not None]
        self._version = self._cache.version
        self._has_histories = any(s.history is not None for s in batch.samplers)
        return StepInput(
            token_ids=np.array(token_ids, dtype=np.int32),
            positions=np.array(positions, dtype=np.int32),
            query_start=np.array(query_start, dtype=np.int32),
            block_tables=self._tables(),
            logit_rows=np.array(rows.tokens, dtype=np.int32),
            sampling=tuple(rows.sampling),
            histories=_histories(rows.owners) if self._has_histories else (),
            masks=_masks(rows.owners) if batch.grammars else (),
            targets=np.array(rows.targets, dtype=np.int32) if batch.num_prompt_rows else None,
        )

    def _tables(self) -> dict[str, NDArray[np.int32]]:
        slots = self._slots
        if len(slots) == 1:
            # A view: it follows the sequence as it grows.
            pick = [rows[slots[0] : slots[0] + 1] for rows in self._cache.rows]
        else:
            pick = [rows[slots] for rows in self._cache.rows]
        return {group.name: table for group, table in zip(self._cache.groups, pick, strict=True)}


class _Rows:
    """The logit rows of a step. owners[r]: the sequence that samples from row r, None for a prompt's."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.targets: list[int] = []
        self.sampling: list[SamplingRow] = []
        self.owners: list[Sequence | None] = []

    def add(self, sequence: Sequence, start: int, count: int, first: int) -> None:
        """The rows of a chunk whose first token is token `first` of the step: the prompt's, then its own."""
        if sequence.prompt_row is not None:
            for position in sequence.prompt_rows(start, count):
                self.tokens.append(first + position - start)
                self.targets.append(sequence.tokens[position + 1])
                self.sampling.append(sequence.prompt_row)
                self.owners.append(None)
        if start + count == len(sequence.tokens):
            self.tokens.append(first + count - 1)
            self.targets.append(-1)
            self.sampling.append(sequence.row)
            self.owners.append(sequence)


def _histories(owners: Iterable[Sequence | None]) -> tuple[TokenHistory | None, ...]:
    return tuple(None if s is None or s.history is None else s.history.view() for s in owners)


def _masks(owners: Iterable[Sequence | None]) -> tuple[NDArray[np.uint32] | None, ...]:
    return tuple(None if s is None or s.grammar is None else s.grammar.words for s in owners)
