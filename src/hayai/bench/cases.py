"""The cases that every raw side runs: what is asked, what is counted. Data, and one function each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from hayai.bench.prompts import PromptSource
from hayai.bench.sides import Shape, Side

DECODE_PROMPT = 32
BATCH_PROMPT = 32


@dataclass(frozen=True)
class Sizes:
    """The lengths of a run."""

    depth: int = 1024
    decode_tokens: int = 128
    depth_tokens: int = 128
    prefill_tokens: int = 512
    batch_sequences: int = 8
    batch_steps: int = 64


@dataclass(frozen=True)
class Outcome:
    """One repetition, computed. `context` is the mean number of cached positions of a decode step (0: the
    roofline does not apply); steps_per_second goes with it."""

    value: float
    started: float
    times: tuple[float, ...]
    context: float = 0.0
    steps_per_second: float = 0.0
    details: Mapping[str, float] = field(default_factory=dict)


Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class RawCase:
    """A case of the engines themselves, without HTTP.

    prompts: lengths of the prompts of one repetition. variant: the calibrated case whose settings apply.
    """

    name: str
    title: str
    unit: str
    group: str
    variant: str
    shape: Callable[[Sizes], Shape]
    prompts: Callable[[Sizes], Sequence[int]]
    run: Callable[[Side, Prompts, Sizes], Outcome]

    def draw(self, source: PromptSource, sizes: Sizes) -> Prompts:
        """The prompts of one repetition, all new."""
        return [source.ids(n) for n in self.prompts(sizes)]


def decode(side: Side, prompts: Prompts, steps: int) -> Outcome:
    """`steps` tokens after the first one; the prompt's own time is not counted."""
    (prompt,) = prompts
    made = side.generate(prompt, steps)
    return Outcome(
        made.rate,
        made.started,
        made.times,
        # step i reads the prompt, the tokens before it, and its own: prompt + i + 1 positions
        context=len(prompt) + (steps + 1) / 2,
        steps_per_second=made.rate,
        details=made.details,
    )


def prefill(side: Side, prompts: Prompts, sizes: Sizes) -> Outcome:
    """Prompt tokens per second up to the first token, which is counted in the time."""
    (prompt,) = prompts
    made = side.generate(prompt, 0)
    return Outcome(len(prompt) / made.first, made.started, made.times, details=made.details)


def first_token(side: Side, prompts: Prompts, sizes: Sizes) -> Outcome:
    (prompt,) = prompts
    made = side.generate(prompt, 0)
    return Outcome(made.first * 1e3, made.started, made.times, details=made.details)


def batch(side: Side, prompts: Prompts, sizes: Sizes) -> Outcome:
    made = side.batch(prompts, sizes.batch_steps)
    return Outcome(made.rate, made.started, made.times, details=made.details)


def ttft_case(tokens: int) -> RawCase:
    return RawCase(
        f"ttft-{tokens}",
        f"time to first token in process, {tokens}-token prompt",
        "ms",
        "ttft",
        "prefill",
        lambda s: Shape(tokens + 1),
        lambda s: [tokens],
        first_token,
    )


RAW_CASES: tuple[RawCase, ...] = (
    RawCase(
        "decode",
        "decode after a 32-token prompt",
        "tok/s",
        "decode",
        "decode",
        lambda s: Shape(DECODE_PROMPT + s.decode_tokens + 1),
        lambda s: [DECODE_PROMPT],
        lambda side, prompts, s: decode(side, prompts, s.decode_tokens),
    ),
    RawCase(
        "decode-depth",
        "decode at depth",
        "tok/s",
        "decode-depth",
        "decode-depth",
        lambda s: Shape(s.depth + s.depth_tokens + 1),
        lambda s: [s.depth],
        lambda side, prompts, s: decode(side, prompts, s.depth_tokens),
    ),
    RawCase(
        "prefill",
        "prefill",
        "tok/s",
        "prefill",
        "prefill",
        lambda s: Shape(s.prefill_tokens + 1),
        lambda s: [s.prefill_tokens],
        prefill,
    ),
    RawCase(
        "batch",
        "decode of several sequences, tokens/s in all",
        "tok/s",
        "batch",
        "batch",
        lambda s: Shape(BATCH_PROMPT + s.batch_steps + 1, s.batch_sequences),
        lambda s: [BATCH_PROMPT] * s.batch_sequences,
        batch,
    ),
    ttft_case(32),
    ttft_case(512),
    ttft_case(700),
)

GROUPS: tuple[str, ...] = (
    "decode", "decode-depth", "prefill", "batch", "ttft", "http", "memory", "start", "contention",
)  # fmt: skip
"""What --cases selects from; `ttft` also covers the servers' time to first token."""


def probe_sizes(sizes: Sizes) -> Sizes:
    """Short forms of the cases for the calibration: same prompts, fewer steps."""
    return Sizes(
        depth=sizes.depth,
        decode_tokens=min(48, sizes.decode_tokens),
        depth_tokens=min(24, sizes.depth_tokens),
        prefill_tokens=sizes.prefill_tokens,
        batch_sequences=sizes.batch_sequences,
        batch_steps=min(16, sizes.batch_steps),
    )


def probes(
    cases: Sequence[RawCase], sizes: Sizes
) -> dict[str, tuple[Shape, Callable[[Side, PromptSource], float]]]:
    """The calibration's probes: case whose settings are sought -> (shape, tokens per second of one try)."""
    short = probe_sizes(sizes)
    wanted = {case.variant for case in cases}
    found: dict[str, tuple[Shape, Callable[[Side, PromptSource], float]]] = {}
    for case in RAW_CASES:
        if case.name in wanted:
            found[case.name] = (case.shape(short), _probe(case, short))
    return found


def _probe(case: RawCase, sizes: Sizes) -> Callable[[Side, PromptSource], float]:
    return lambda side, source: case.run(side, case.draw(source, sizes), sizes).value
