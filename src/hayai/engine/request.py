"""Requests and what comes back: integers, numbers and bit masks only; text lives above."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from hayai.engine.mask import MaskSource
from hayai.errors import RequestError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. The names and defaults are OpenAI's, with the usual extensions.

    max_tokens None = until the context is full. temperature 0 = greedy. seed None = a fresh random one.
    stop: strings that end the text (cut before them). logprobs: None, or how many alternatives (0..20).
    ignore_eos: go on past the end-of-text token (benchmarks). Values are checked; RequestError names the
    field.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 2.0),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        ):
            _check_range(name, getattr(self, name), low, high)
        if not (math.isfinite(self.repetition_penalty) and 0.0 < self.repetition_penalty <= 10.0):
            _refuse("repetition_penalty", "above 0 and at most 10", self.repetition_penalty)
        if self.top_p <= 0.0:
            _refuse("top_p", "above 0 and at most 1", self.top_p)
        if self.top_k < 0:
            _refuse("top_k", "0 (off) or more", self.top_k)
        if self.max_tokens is not None and self.max_tokens < 1:
            _refuse("max_tokens", "at least 1", self.max_tokens)
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            _refuse("logprobs", f"from 0 to {MAX_LOGPROBS}", self.logprobs)
        if len(self.stop) > MAX_STOP_STRINGS or any(not s for s in self.stop):
            _refuse("stop", f"at most {MAX_STOP_STRINGS} non-empty strings", list(self.stop))
        for token, value in self.logit_bias.items():
            if token < 0 or not math.isfinite(value) or not -100.0 <= value <= 100.0:
                _refuse("logit_bias", "token ids with values from -100 to 100", {token: value})
        if self.seed is not None and not 0 <= self.seed < 1 << 64:
            _refuse("seed", "from 0 to 2^64 - 1", self.seed)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        _refuse(name, f"from {low:g} to {high:g}", value)


def _refuse(name: str, expected: str, value: object) -> None:
    raise RequestError(f"{name} must be {expected}: {value!r}", param=name, code="invalid_value")


@dataclass(frozen=True)
class EngineRequest:
    """A prompt as token ids, ready to be scheduled.

    priority: lower runs first (`INTERACTIVE` before `BATCH`). tenant: between tenants of one priority the
    engine is fair. cache_salt: a cached prefix is shared only between equal salts. mask: restricts every
    token to a grammar; it belongs to this request alone. prompt_logprobs: None, or how many alternatives per
    prompt token (0..20); such a prompt is computed whole, without the prefix cache. deadline: monotonic
    seconds after which the request ends with 'timeout' at the next step.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    mask: MaskSource | None = None
    prompt_logprobs: int | None = None
    deadline: float | None = None


INTERACTIVE = 0
BATCH = 10
"""Priorities: somebody waits for the answer; nobody does."""


@dataclass(frozen=True)
class Logprob:
    """Log-probability of the chosen token, and of the best alternatives (id, logprob), best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class RequestTiming:
    """Seconds on the monotonic clock, for usage and honest headers.

    num_steps, sum_batch and max_batch: the steps that this request ran in, the sequences of these steps added
    up (their mean is sum_batch / num_steps), and the most in one step. num_preemptions: how often it lost its
    place and was computed again.
    """

    arrived: float
    scheduled: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    num_steps: int = 0
    sum_batch: int = 0
    max_batch: int = 0
    num_preemptions: int = 0


class TokenEvent(NamedTuple):
    """One generated token of one request. The last event of a request carries `finish_reason`.

    finish_reason: None, 'stop' (end token or stop id; the token itself is then not text), 'length',
    'timeout' and 'abort' (token_id is -1) or 'error' (token_id -1, `error` says why). The first and the last
    event carry the request's timing as the engine saw it. prompt_logprobs: on the first event of a request
    that asked for them, one entry per prompt token, None for the first (nothing predicts it).
    own_fault: of an error: that of the request's own mask, not the engine's.
    """

    request_id: str
    token_id: int
    finish_reason: str | None = None
    logprob: Logprob | None = None
    error: str | None = None
    timing: RequestTiming | None = None
    prompt_logprobs: tuple[Logprob | None, ...] | None = None
    own_fault: bool = False
