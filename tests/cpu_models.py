"""Tiny models compiled for the CPU backend, for its tests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

import hayai._native as _native
from hayai.backends.cpu import CpuBackend, CpuRunner
from hayai.config import ModelConfig, RopeConfig
from hayai.models.registry import build_plans
from hayai.plan.plan import Plan
from hayai.weights.loader import FileWeights
from tiny_models import LIMITS, LLAMA, MemoryFile, llama_tensors

ISAS = list(_native.kernel_isas())

WIDE = replace(
    LLAMA, hidden_size=96, head_dim=32, num_heads=6, num_kv_heads=2, ffn_size=160, vocab_size=328,
    rope=RopeConfig(theta=10000.0, rotary_dim=32, interleaved=True), tied_head=True,
)  # fmt: skip


def plan_of(config: ModelConfig) -> Plan:
    return build_plans(config, "hf")["main"]


def compile_cpu(
    config: ModelConfig, format: str, threads: int = 2, isa: str | None = None, seed: int = 0
) -> CpuRunner:
    plan = plan_of(config)
    weights = FileWeights(MemoryFile(llama_tensors(config, seed), format), "hf", plan.slots)
    return CpuBackend(threads, isa).compile({"main": plan}, weights, LIMITS)


def tokens_for(config: ModelConfig, count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, config.vocab_size, count).tolist()
