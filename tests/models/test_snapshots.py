"""Plans as text, for review: a change of wiring shows as a diff.

Renew with `RENEW=1 pytest tests/models/test_snapshots.py`, and read the diff before committing it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hayai.config import ModelConfig, RopeConfig
from hayai.models.registry import build_plans
from hayai.plan.validate import dump
from tiny_models import GLM

SNAPSHOTS = Path(__file__).parent / "snapshots"

SMOLLM2_135M = ModelConfig(
    architecture="llama",
    vocab_size=49152,
    hidden_size=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    ffn_size=1536,
    context_length=8192,
    norm_eps=1e-5,
    rope=RopeConfig(theta=100000.0, rotary_dim=64, interleaved=True),
    tied_head=True,
)

CASES = {
    "smollm2-135m": (SMOLLM2_135M, "gguf", "main"),
    "glm-5.1-tiny-main": (GLM, "hf", "main"),
    "glm-5.1-tiny-draft": (GLM, "hf", "draft"),
}


@pytest.mark.parametrize("name", CASES)
def test_plan_is_as_reviewed(name: str) -> None:
    config, container, plan = CASES[name]
    text = dump(build_plans(config, container)[plan])
    path = SNAPSHOTS / f"{name}.txt"
    if os.environ.get("RENEW"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"no snapshot {path.name}; see the command above"
    assert text == path.read_text()
