"""When requests arrive, and which: Poisson, and recorded traces scaled in time, in length and in users.

A trace is thinned by whole conversations, not by single requests, because requests of one conversation share
their prefixes: taking every tenth request would take the reuse away that the trace was recorded for. Which
of them are kept is drawn from the seed.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from hayai.errors import ConfigError

BLOCK_TOKENS = 512
"""Tokens per hash id of a Mooncake trace."""


@dataclass(frozen=True)
class Arrival:
    """One request of a trace. at: seconds since the trace's begin; lengths in tokens.

    blocks: ids of the blocks of the prompt, `block_tokens` tokens each (the last one may be cut); equal ids
    mean equal text. Empty: a prompt of its own. group: requests of one conversation.
    """

    at: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    block_tokens: int = BLOCK_TOKENS
    group: int = 0


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """`count` arrival times of a Poisson process of `rate` per second, the first one at 0."""
    if rate <= 0 or count < 1:
        raise ValueError(f"a Poisson process needs a rate and a count above 0: {rate}, {count}")
    rng = random.Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += rng.expovariate(rate)
    return times


# ---------------------------------------------------------------- reading


def azure(path: Path) -> list[Arrival]:
    """An Azure LLM inference trace of 2023: TIMESTAMP, ContextTokens, GeneratedTokens."""
    rows = list(csv.DictReader(io.StringIO(_text(path))))
    found: list[Arrival] = []
    first: datetime | None = None
    for row in rows:
        # the recorded fraction has seven digits, datetime takes six
        moment = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26])
        first = first or moment
        at = (moment - first).total_seconds()
        found.append(Arrival(at, int(row["ContextTokens"]), int(row["GeneratedTokens"]), group=len(found)))
    return found


def mooncake(path: Path, seed: int = 0) -> list[Arrival]:
    """A Mooncake trace: timestamp (ms), input_length, output_length, hash_ids per 512-token block.

    Its clock moves in steps (of 3 s in the conversation trace): requests of one step are spread evenly at
    random over it, because arriving at once would be an artefact of the recording. A conversation is known
    by its second block; the first is the same system prompt for all.
    """
    rows = [json.loads(line) for line in _text(path).splitlines() if line]
    times = sorted({row["timestamp"] for row in rows})
    step = {now: later - now for now, later in itertools.pairwise(times)}
    rng = random.Random(seed)
    found: list[Arrival] = []
    for row in rows:
        at = (row["timestamp"] + rng.random() * step.get(row["timestamp"], 0.0)) / 1e3
        blocks = tuple(row["hash_ids"])
        group = blocks[1] if len(blocks) > 1 else -1 - len(found)
        found.append(Arrival(at, row["input_length"], row["output_length"], blocks, group=group))
    return sorted(found, key=lambda arrival: arrival.at)


TRACES: Mapping[str, tuple[str, str, Callable[[Path], list[Arrival]]]] = {
    "azure-conv": ("trace_azure_llm_2023", "AzureLLMInferenceTrace_conv.csv", azure),
    "azure-code": ("trace_azure_llm_2023", "AzureLLMInferenceTrace_code.csv", azure),
    "mooncake": ("trace_mooncake", "conversation_trace.jsonl", mooncake),
    "mooncake-synthetic": ("trace_mooncake", "synthetic_trace.jsonl", mooncake),
}
"""Name -> folder below the data directory, file (there with or without .gz), reader."""


def data_file(data: Path | None, folder: str, name: str) -> Path:
    """A file of the evaluation data; ConfigError says what was looked for."""
    if data is None:
        raise ConfigError(f"{name} is needed: say where with --data DIR, or HAYAI_DATA")
    places = [data / folder / name, data / folder / f"{name}.gz", data / name, data / f"{name}.gz"]
    for place in places:
        if place.is_file():
            return place
    raise ConfigError(f"no {name}; looked for {', '.join(str(place) for place in places)}")


def read_trace(name: str, data: Path | None) -> list[Arrival]:
    """A trace of TRACES, in order of arrival."""
    if name not in TRACES:
        raise ConfigError(f"there is no trace {name!r}; there are: {', '.join(TRACES)}")
    folder, file, read = TRACES[name]
    return read(data_file(data, folder, file))


def _text(path: Path) -> str:
    raw = path.read_bytes()
    return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()


# ---------------------------------------------------------------- scaling


def scaled_lengths(trace: Sequence[Arrival], factor: float, context: int) -> list[Arrival]:
    """Lengths divided by `factor`, rounded up; a request that still passes the context is left out.

    Blocks shrink by the same factor (512 tokens / 16 = 32), so that shares of shared prefixes stay.
    """
    block = max(1, round(BLOCK_TOKENS / factor))
    found = []
    for arrival in trace:
        prompt = max(1, math.ceil(arrival.prompt_tokens / factor))
        if arrival.blocks:
            # the last block is cut as the prompt is
            prompt = min(prompt, block * len(arrival.blocks))
        output = max(1, math.ceil(arrival.output_tokens / factor))
        if prompt + output <= context:
            found.append(replace(arrival, prompt_tokens=prompt, output_tokens=output, block_tokens=block))
    return found


def thinned(trace: Sequence[Arrival], count: int, seed: int) -> list[Arrival]:
    """At least `count` requests (all there are if fewer): whole conversations, drawn at random, in order."""
    groups = sorted({arrival.group for arrival in trace})
    random.Random(seed).shuffle(groups)
    sizes: dict[int, int] = {}
    for arrival in trace:
        sizes[arrival.group] = sizes.get(arrival.group, 0) + 1
    kept: set[int] = set()
    total = 0
    for group in groups:
        if total >= count:
            break
        kept.add(group)
        total += sizes[group]
    return [arrival for arrival in trace if arrival.group in kept]


def at_rate(trace: Sequence[Arrival], rate: float) -> list[Arrival]:
    """The same arrivals with their times scaled so that `rate` come per second on average, from 0 on."""
    if len(trace) < 2 or rate <= 0:
        raise ValueError(f"a rate needs two arrivals and must be above 0: {len(trace)}, {rate}")
    first, last = trace[0].at, trace[-1].at
    span = (len(trace) - 1) / rate
    factor = span / (last - first) if last > first else 0.0
    return [replace(arrival, at=(arrival.at - first) * factor) for arrival in trace]


def time_factor(trace: Sequence[Arrival], rate: float) -> float:
    """How much faster than recorded a trace runs at that rate."""
    return (trace[-1].at - trace[0].at) * rate / max(1, len(trace) - 1)


def shared_tokens(trace: Sequence[Arrival]) -> tuple[int, int]:
    """(prompt tokens that an unbounded prefix cache would have, all prompt tokens) in this order."""
    seen: set[tuple[int, ...]] = set()
    hits = total = 0
    for arrival in trace:
        total += arrival.prompt_tokens
        matched = True
        for i in range(len(arrival.blocks)):
            prefix = arrival.blocks[: i + 1]
            matched = matched and prefix in seen
            if matched:
                hits += min(arrival.block_tokens, arrival.prompt_tokens - i * arrival.block_tokens)
            seen.add(prefix)
    return hits, total


def distinct_blocks(trace: Sequence[Arrival]) -> Iterator[int]:
    """Every block id once, in order of first use."""
    yield from dict.fromkeys(block for arrival in trace for block in arrival.blocks)
