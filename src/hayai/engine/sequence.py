"""One request while it runs: its tokens, how far they are computed, and what is fixed about it."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np

from hayai.backends.base import BLOCK_SIZE, SamplingRow, TokenHistory
from hayai.engine.kv_cache import SequenceBlocks
from hayai.engine.mask_worker import Grammar
from hayai.engine.prefix_cache import TokenChain
from hayai.engine.request import EngineRequest, Logprob, RequestTiming, SamplingParams

_NO_ROWS = range(0)


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
    max_length: prompt and output together. blocks: None while the sequence waits. number: order of arrival.
    chain: names of its blocks in the prefix cache. grammar: its mask. prompt_logprobs: those computed so far
    (they are never computed twice); prompt_row: how they are asked for, None where they are not wanted.
    num_charged, num_settled: prompt tokens and outputs that fairness has counted.
    """

    __slots__ = (
        "arrived",
        "blocks",
        "chain",
        "deadline",
        "first_token",
        "grammar",
        "history",
        "max_batch",
        "max_length",
        "num_cached",
        "num_charged",
        "num_computed",
        "num_preemptions",
        "num_prompt",
        "num_settled",
        "num_steps",
        "number",
        "plain",
        "priority",
        "prompt_logprobs",
        "prompt_row",
        "request_id",
        "row",
        "scheduled",
        "stop_ids",
        "sum_batch",
        "tenant",
        "tokens",
    )

    def __init__(
        self,
        request: EngineRequest,
        seed: int,
        end_ids: frozenset[int],
        max_length: int,
        arrived: float,
        number: int = 0,
    ) -> None:
        params = request.params
        self.request_id = request.request_id
        self.priority = request.priority
        self.tenant = request.tenant
        self.deadline = request.deadline
        self.number = number
        self.tokens = list(request.prompt_ids)
        self.num_prompt = len(self.tokens)
        self.num_computed = 0
        self.num_cached = 0
        self.num_preemptions = 0
        self.num_charged = self.num_settled = 0
        self.num_steps = self.sum_batch = self.max_batch = 0
        self.blocks: SequenceBlocks | None = None
        self.chain: TokenChain | None = None
        self.grammar: Grammar | None = None
        self.row = sampling_row(params, seed)
        self.history = PenaltyHistory(request.prompt_ids) if _has_penalties(params) else None
        # A grammar has nothing to say about what follows its end.
        ends = frozenset[int]() if params.ignore_eos and request.mask is None else end_ids
        self.stop_ids = frozenset(params.stop_token_ids) | ends
        wanted = max_length if params.max_tokens is None else self.num_prompt + params.max_tokens
        self.max_length = min(max_length, wanted)
        self.prompt_row: SamplingRow | None = None
        self.prompt_logprobs: list[Logprob | None] = [None]
        if request.prompt_logprobs is not None:
            self.prompt_row = SamplingRow(num_logprobs=request.prompt_logprobs)
        self.plain = False
        self.arrived = arrived
        self.scheduled = 0.0
        self.first_token = 0.0

    def most_shared(self) -> int:
        """Blocks that may come from the prefix cache: a token has to be left to run, and what a prompt's
        log-probabilities still need is computed."""
        most = len(self.tokens) - 1
        if self.prompt_row is not None and len(self.prompt_logprobs) < self.num_prompt:
            most = min(most, len(self.prompt_logprobs) - 1)
        return most // BLOCK_SIZE

    def prompt_rows(self, start: int, count: int) -> range:
        """Positions in start..start+count-1 whose rows give log-probabilities of the prompt."""
        if self.prompt_row is None:
            return _NO_ROWS
        return range(max(start, len(self.prompt_logprobs) - 1), min(start + count, self.num_prompt - 1))

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
            num_steps=self.num_steps,
            sum_batch=self.sum_batch,
            max_batch=self.max_batch,
            num_preemptions=self.num_preemptions,
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
