"""Bytes of a step: against the file itself, and against a count by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from hayai.backends.base import Limits
from hayai.backends.cpu import CpuBackend
from hayai.bench.claims import step_bytes
from hayai.models.registry import build_plans
from hayai.weights.gguf import GgufFile, model_config
from hayai.weights.loader import FileWeights

ROWS, HIDDEN = 49152, 576


def test_the_default_model_is_counted_once_and_completely(default_model: Path) -> None:
    """All tensors are read by a step; the tied embedding once as the head, plus one row of it."""
    counted = step_bytes(default_model)
    with GgufFile(default_model) as file:
        all_bytes = sum(info.nbytes for info in file.tensors.values())
        embedding = file.tensors["token_embd.weight"].nbytes
    row = embedding // ROWS
    assert counted.matrices + counted.head + counted.small == all_bytes + row
    assert counted.head == embedding == ROWS * HIDDEN // 32 * 34
    assert counted.matrices == pytest.approx(66.36e6, rel=1e-3)


def test_keys_and_values_by_hand(default_model: Path) -> None:
    """30 layers, 3 heads of 64, keys and values, 2 bytes: 23,040 bytes a position."""
    counted = step_bytes(default_model)
    assert counted.kv_per_position == 30 * 3 * (64 + 64) * 2
    assert counted.total(1024) - counted.total(0) == 1024 * counted.kv_per_position


def test_the_screened_head_reads_its_plane_and_the_survivors(default_model: Path) -> None:
    counted = step_bytes(default_model)
    plane = ROWS * (HIDDEN // 32 + 1) * (16 + 2)
    assert counted.screened_head == plane
    saved = counted.total(0) - counted.total(0, screened=True, survivors=0)
    assert saved == counted.head - plane > 13e6
    one = counted.total(0, screened=True, survivors=1) - counted.total(0, screened=True)
    assert one == HIDDEN // 32 * (16 + 2) == 324  # of the low plane


def test_the_runner_says_the_same(default_model: Path) -> None:
    """What is counted from the file is what the backend packed."""
    counted = step_bytes(default_model)
    with GgufFile(default_model) as file:
        plans = build_plans(model_config(file), "gguf")
        weights = FileWeights(file, "gguf", plans["main"].slots)
        limits = Limits(max_tokens=16, max_sequences=1, max_rows=1, num_blocks=8, max_context=128)
        said = CpuBackend(1).compile(plans, weights, limits).describe()
    assert said["survivor_row_bytes"] == counted.survivor_row
    assert said["step_bytes"] == counted.matrices + (counted.screened_head or 0)
    assert said["kv_bytes_per_token"] == counted.kv_per_position
