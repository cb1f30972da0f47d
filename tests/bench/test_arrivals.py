"""Arrival times and traces: reading, scaling, thinning; hand-made files, and the real ones where they are."""

from __future__ import annotations

import gzip
import itertools
import json
import statistics
from pathlib import Path

import pytest

from hayai.bench.arrivals import (
    TRACES,
    Arrival,
    at_rate,
    data_file,
    mooncake,
    poisson,
    read_trace,
    scaled_lengths,
    shared_tokens,
    thinned,
    time_factor,
)
from hayai.config import read_environment
from hayai.errors import ConfigError


def test_poisson_arrivals_have_their_rate_and_their_spread() -> None:
    times = poisson(4.0, 20_000, seed=1)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert times[0] == 0.0 and min(gaps) > 0
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.03)
    # an exponential distribution's deviation is its mean
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.05)
    assert poisson(4.0, 10, seed=1) == times[:10]
    with pytest.raises(ValueError, match="above 0"):
        poisson(0.0, 5, seed=1)


def test_an_azure_file_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "trace_azure_llm_2023"
    folder.mkdir()
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 23:59:59.5000000,374,44\n"
        "2023-11-17 00:00:01.2500000,12,1"
    )
    (folder / "AzureLLMInferenceTrace_conv.csv.gz").write_bytes(gzip.compress(text.encode()))
    first, second = read_trace("azure-conv", tmp_path)
    assert (first.at, first.prompt_tokens, first.output_tokens, first.blocks) == (0.0, 374, 44, ())
    assert (second.at, second.prompt_tokens, second.output_tokens) == (1.75, 12, 1)
    assert first.group != second.group


ROWS = [
    {"timestamp": 0, "input_length": 1100, "output_length": 100, "hash_ids": [0, 1, 2]},
    {"timestamp": 0, "input_length": 512, "output_length": 50, "hash_ids": [0]},
    {"timestamp": 3000, "input_length": 1600, "output_length": 10, "hash_ids": [0, 1, 2, 3]},
    {"timestamp": 6000, "input_length": 700, "output_length": 10, "hash_ids": [0, 7]},
]


def hand_made(folder: Path) -> list[Arrival]:
    path = folder / "conversation_trace.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n")
    return mooncake(path)


def test_a_mooncake_file_is_read_and_its_clock_steps_are_spread(tmp_path: Path) -> None:
    trace = hand_made(tmp_path)
    assert len(trace) == 4
    early = [a for a in trace if a.at < 3.0]
    assert len(early) == 2 and early[0].at != early[1].at
    assert all(0.0 <= a.at < 3.0 for a in early)
    assert 3.0 <= trace[2].at < 6.0 and trace[3].at == 6.0
    by_blocks = {a.blocks: a for a in trace}
    assert by_blocks[(0, 1, 2)].group == by_blocks[(0, 1, 2, 3)].group == 1
    assert len({a.group for a in trace}) == 3


def test_lengths_shrink_with_their_blocks(tmp_path: Path) -> None:
    scaled = scaled_lengths(hand_made(tmp_path), 16, context=8192)
    by_blocks = {a.blocks: a for a in scaled}
    first = by_blocks[(0, 1, 2)]
    assert (first.prompt_tokens, first.output_tokens, first.block_tokens) == (69, 7, 32)
    assert by_blocks[(0,)].prompt_tokens == 32
    assert len(scaled_lengths(hand_made(tmp_path), 16, context=80)) == 3


def test_shared_prefixes_are_counted_in_order(tmp_path: Path) -> None:
    """In order: blocks 0 1 2, then 0 (shared), then 0 1 2 3 (96 of 100 shared), then 0 7 (32 shared)."""
    scaled = [
        Arrival(0.0, 69, 7, (0, 1, 2), 32, 1),
        Arrival(1.0, 32, 4, (0,), 32, 2),
        Arrival(2.0, 100, 1, (0, 1, 2, 3), 32, 1),
        Arrival(3.0, 44, 1, (0, 7), 32, 7),
    ]
    assert shared_tokens(scaled) == (0 + 32 + 96 + 32, 69 + 32 + 100 + 44)
    # block 2 behind another first block is another text
    assert shared_tokens([Arrival(0.0, 64, 1, (0, 2), 32), Arrival(1.0, 64, 1, (5, 2), 32)])[0] == 0


def test_thinning_keeps_conversations_whole_and_in_order() -> None:
    trace = [Arrival(float(i), 1, 1, group=i % 10) for i in range(100)]
    kept = thinned(trace, 25, seed=3)
    groups = {a.group for a in kept}
    assert len(groups) == 3 and len(kept) == 30
    assert kept == [a for a in trace if a.group in groups]
    assert thinned(trace, 25, seed=3) == kept
    assert thinned(trace, 1000, seed=3) == trace


def test_time_is_scaled_to_a_rate() -> None:
    trace = [Arrival(10.0 + t, 1, 1) for t in (0.0, 1.0, 5.0, 6.0)]
    scaled = at_rate(trace, 2.0)
    assert [a.at for a in scaled] == pytest.approx([0.0, 0.25, 1.25, 1.5])
    assert (len(scaled) - 1) / (scaled[-1].at - scaled[0].at) == pytest.approx(2.0)
    assert time_factor(trace, 2.0) == pytest.approx(4.0)
    with pytest.raises(ValueError, match="two arrivals"):
        at_rate(trace[:1], 2.0)


def test_missing_data_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data DIR, or HAYAI_DATA"):
        data_file(None, "folder", "file.csv")
    with pytest.raises(ConfigError, match=r"looked for .*folder/file\.csv"):
        data_file(tmp_path, "folder", "file.csv")
    with pytest.raises(ConfigError, match="azure-conv"):
        read_trace("azure-2024", tmp_path)


@pytest.mark.parametrize("name", TRACES)
def test_the_recorded_traces_can_be_replayed(name: str) -> None:
    data = read_environment().data
    if data is None or not (data / TRACES[name][0]).is_dir():
        pytest.skip("the recorded traces are not here (HAYAI_DATA)")
    trace = read_trace(name, data)
    assert len(trace) > 3000
    assert all(b.at >= a.at for a, b in itertools.pairwise(trace))
    scaled = scaled_lengths(trace, 16, context=8191)
    assert all(a.prompt_tokens + a.output_tokens <= 8191 for a in scaled)
    assert len(scaled) > 0.9 * len(trace)
    for arrival in scaled[:2000]:
        if arrival.blocks:
            assert -(-arrival.prompt_tokens // arrival.block_tokens) == len(arrival.blocks)
