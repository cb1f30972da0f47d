"""One request while it runs: its tokens, how far they are computed, and what is fixed about it."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np

from hayai.backends.base import SamplingRow, TokenHistory
from hayai.engine.kv_cache import SequenceBlocks
from hayai.engine.request import EngineRequest, RequestTiming, SamplingParams


class PenaltyHistory:
    """The distinct tokens of a sequence with their counts in the output, kept up to date one by one."""

    __slots__ = ("_counts", "_ids", "_index", "_view")

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        distinct = list(dict.fromkeys(prompt_ids))
        self._index = {token: i for i, token in enumerate(distinct)}
        self._ids = np.zeros(max(64, 2 * len(distinct)), dtype=np.int32)
        self._ids[: len(distinct)] = distinct
        self._counts = np.zeros_like(self._ids)
        self._view: TokenHistory | None = None

    def add(self, token: int) -> None:
        """Count one output token."""
        at = self._index.get(token)
        if at is None:
            at = self._index[token] = len(self._index)
            if at == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[at] = token
            self._view = None
        self._counts[at] += 1

    def view(self) -> TokenHistory:
        """The history as the backend wants it: views, valid until the next `add`."""
        if self._view is None:
            size = len(self._index)
            self._view = TokenHistory(self._ids[:size], self._counts[:size])
        return self._view


class Sequence:
    """A request in the engine.

    tokens: prompt and output. The first `num_computed` of them have their keys and values in the cache; a
    step runs tokens from there on, and asks for a new one when it reaches the last. Preemption sets
    `num_computed` back to 0 and loses nothing else, so prompt, decode and recomputation are one case.
    plain: its tokens need nothing but to be passed on (set with the first one, which needs its time taken).
    max_length: prompt and output together. blocks: None while the sequence waits.
    """

    __slots__ = (
        "arrived",
        "blocks",
        "first_token",
        "history",
        "max_length",
        "num_cached",
        "num_computed",
        "num_prompt",
        "plain",
        "request_id",
        "row",
        "scheduled",
        "stop_ids",
        "tokens",
    )

    def __init__(
        self, request: EngineRequest, seed: int, end_ids: frozenset[int], max_length: int, arrived: float
    ) -> None:
        params = request.params
        self.request_id = request.request_id
        self.tokens = list(request.prompt_ids)
        self.num_prompt = len(self.tokens)
        self.num_computed = 0
        self.num_cached = 0
        self.blocks: SequenceBlocks | None = None
        self.row = sampling_row(params, seed)
        self.history = PenaltyHistory(request.prompt_ids) if _has_penalties(params) else None
        self.stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else end_ids)
        wanted = max_length if params.max_tokens is None else self.num_prompt + params.max_tokens
        self.max_length = min(max_length, wanted)
        self.plain = False
        self.arrived = arrived
        self.scheduled = 0.0
        self.first_token = 0.0

    def timing(self) -> RequestTiming:
        """Times up to now, for the last event."""
        return RequestTiming(
            arrived=self.arrived,
            scheduled=self.scheduled,
            first_token=self.first_token,
            finished=time.monotonic(),
            prompt_tokens=self.num_prompt,
            cached_tokens=self.num_cached,
            output_tokens=len(self.tokens) - self.num_prompt,
        )


def sampling_row(params: SamplingParams, seed: int) -> SamplingRow:
    """The backend's view of the parameters, built once per request."""
    return SamplingRow(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        bias=tuple(sorted(params.logit_bias.items())),
        seed=seed,
        num_logprobs=-1 if params.logprobs is None else params.logprobs,
    )


def _has_penalties(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
    )
