"""flops and bytes, against sums worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hayai.models.registry import build_plans
from hayai.plan import ops
from hayai.plan.plan import Plan
from hayai.plan.shapes import Traffic, bytes_moved, flops
from tiny_models import GLM, LLAMA

LLAMA_MAIN = build_plans(LLAMA, "hf")["main"]
GLM_MAIN = build_plans(GLM, "hf")["main"]


def first(plan: Plan, kind: type[ops.Op]) -> ops.Op:
    return next(op for op in plan.ops if type(op) is kind)


def test_decode_reads_every_weight_once() -> None:
    """hidden 64, heads 4 x 16, kv heads 2, ffn 96, vocab 96, three layers."""
    per_layer = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 96 * 64 + 2 * 64
    total = sum(
        (bytes_moved(op, LLAMA_MAIN, 1, 1, 1, 100, weight_bits=8) for op in LLAMA_MAIN.ops), Traffic()
    )
    one_row_of_the_embedding = 64
    assert total.weights == pytest.approx(3 * per_layer + 64 + 96 * 64 + one_row_of_the_embedding)


def test_weight_bits_by_slot() -> None:
    op = first(LLAMA_MAIN, ops.Linear)
    bits = {"layers.0.q": 5.0, "layers.0.k": 8.5, "layers.0.v": 16.0}
    traffic = bytes_moved(op, LLAMA_MAIN, 1, 1, 1, 1, weight_bits=bits)
    assert traffic.weights == (64 * 64 * 5 + 32 * 64 * 8.5 + 32 * 64 * 16) / 8
    assert traffic.activations == 4 * (64 + 64 + 32 + 32)


def test_matrix_flops() -> None:
    assert flops(first(LLAMA_MAIN, ops.Linear), LLAMA_MAIN, 7, 1, 1, 4) == 2 * 7 * 64 * (64 + 32 + 32)
    assert flops(first(LLAMA_MAIN, ops.LmHead), LLAMA_MAIN, 7, 1, 3, 4) == 2 * 3 * 64 * 96
    assert flops(first(GLM_MAIN, ops.HeadLinear), GLM_MAIN, 5, 1, 1, 3) == 2 * 5 * 4 * 32 * 16
    assert flops(first(GLM_MAIN, ops.MoeLinear), GLM_MAIN, 5, 1, 1, 3) == 2 * (2 * 5 * 2 * 32 * 64)


def test_attention_of_decode() -> None:
    op = first(LLAMA_MAIN, ops.Attention)
    assert flops(op, LLAMA_MAIN, 3, 3, 3, 50) == 3 * 4 * 50 * (2 * 16 + 2 * 16 + 3)
    traffic = bytes_moved(op, LLAMA_MAIN, 3, 3, 3, 50)
    assert traffic.kv == 3 * 50 * 2 * (16 + 16) * 2
    assert bytes_moved(first(LLAMA_MAIN, ops.KvAppend), LLAMA_MAIN, 3, 3, 3, 50).kv == 3 * 2 * 32 * 2


def test_attention_of_prefill_reads_each_position_once() -> None:
    op = first(LLAMA_MAIN, ops.Attention)
    assert bytes_moved(op, LLAMA_MAIN, 40, 1, 1, 20.5).kv == 40 * 2 * (16 + 16) * 2


def test_window_and_selection_bound_what_is_read() -> None:
    op = replace(first(LLAMA_MAIN, ops.Attention), window=8)
    assert bytes_moved(op, LLAMA_MAIN, 1, 1, 1, 50).kv == 8 * 2 * 32 * 2
    assert flops(op, LLAMA_MAIN, 1, 1, 1, 50) == 4 * 8 * (2 * 16 + 2 * 16 + 3)
    sparse = first(GLM_MAIN, ops.Attention)
    assert bytes_moved(sparse, GLM_MAIN, 1, 1, 1, 50, kv_bytes=4).kv == 16 * (32 + 8) * 4
    index = first(GLM_MAIN, ops.IndexTopk)
    assert bytes_moved(index, GLM_MAIN, 1, 1, 1, 50, kv_bytes=4).kv == 50 * 16 * 4


def test_experts_that_a_step_is_likely_to_read() -> None:
    op = first(GLM_MAIN, ops.MoeLinear)
    whole = 2 * 8 * 32 * 64 * 2
    assert bytes_moved(op, GLM_MAIN, 1, 1, 1, 1).weights == pytest.approx(whole * 2 / 8)
    assert bytes_moved(op, GLM_MAIN, 2, 2, 1, 1).weights == pytest.approx(whole * (1 - 0.75**2))
    assert bytes_moved(op, GLM_MAIN, 200, 1, 1, 1).weights == pytest.approx(whole)


def test_every_op_of_a_plan_has_a_cost() -> None:
    for plan in (LLAMA_MAIN, GLM_MAIN):
        for op in plan.ops:
            assert flops(op, plan, 4, 2, 2, 30) >= 0
            traffic = bytes_moved(op, plan, 4, 2, 2, 30)
            assert traffic.total > 0
