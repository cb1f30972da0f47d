"""Instruction sets against each other, and what their object files may contain."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from kernel_harness import (
    INTEGER_LAYOUTS,
    ISAS,
    KERNELS,
    LAYOUTS,
    aligned,
    from_codes,
    gemm,
    pack,
    quantize,
    same_bits,
)

from hayai import _native

ROOT = Path(__file__).resolve().parents[2]
wide_pair = pytest.mark.skipif("avx512" not in ISAS, reason="this machine lacks AVX-512 with VNNI")


def test_ceiling_chooses_the_table() -> None:
    for isa in ISAS:
        assert _native.Kernels(isa).name == isa
    assert _native.Kernels("").name == ISAS[-1]


@wide_pair
@pytest.mark.parametrize("name", INTEGER_LAYOUTS)
def test_avx512_has_the_bits_of_avx2(name: str) -> None:
    layout, cols = LAYOUTS[name], 576
    rng = np.random.default_rng(4)
    rows = layout.random(rng, 48, cols)
    scale = rng.random((9, cols // 32)).astype(np.float32)
    a = from_codes(rng.integers(-127, 128, (9, cols), np.int8), scale, layout.factor)
    got = [
        gemm(KERNELS[isa], layout, pack(layout, KERNELS[isa].group_rows, rows, cols), cols, a)
        for isa in ("avx2", "avx512")
    ]
    assert same_bits(*got)


@wide_pair
def test_elementwise_bits_agree_between_avx2_and_avx512() -> None:
    x = (np.random.default_rng(4).normal(size=1024) * 3).astype(np.float32)
    results = []
    for isa in ("avx2", "avx512"):
        kernels = KERNELS[isa]
        norm, act, capped, e = (aligned(len(x)) for _ in range(4))
        kernels.rms_norm(x, x, 0.5, 1e-5, norm)
        kernels.activation(0, x, act)
        kernels.softcap(x, 5.0, capped)
        total = kernels.exp_sum(x, 9.0, 1.0, e)
        a = quantize(kernels, x[None], -8)
        results.append((norm, act, capped, e, a.q, a.scale, a.sum, np.array([total])))
    assert all(same_bits(one, other) for one, other in zip(*results, strict=True))


@wide_pair
@pytest.mark.parametrize("kv_format", [0, 1])
def test_attention_bits_agree_between_avx2_and_avx512(kv_format: int) -> None:
    rng = np.random.default_rng(4)
    heads, dim, length = 3, 64, 100
    pages = np.zeros((7, 16 * 2 * (2 * dim if kv_format == 0 else dim + 2)), np.uint8)
    for p in range(length):
        key, value = rng.normal(size=(2, dim)).astype(np.float32)
        other = pages[p // 16].copy()
        KERNELS["avx2"].kv_store(pages[p // 16], p % 16, key, value, kv_format)
        KERNELS["avx512"].kv_store(other, p % 16, key, value, kv_format)
        assert same_bits(pages[p // 16], other)
    q = rng.normal(size=5 * heads * dim).astype(np.float32)
    results = []
    for isa in ("avx2", "avx512"):
        out, stats = aligned(len(q)), aligned(5 * heads * 2)
        KERNELS[isa].attend(
            q,
            5,
            heads,
            dim,
            dim,
            length - 5,
            0,
            0,
            2,
            pages,
            np.arange(7, dtype=np.int32),
            0.125,
            0.0,
            out,
            stats,
            kv_format,
        )
        results.append((out, stats))
    assert all(same_bits(one, other) for one, other in zip(*results, strict=True))


def test_object_files_share_no_symbol_between_instruction_sets() -> None:
    """A weak symbol compiled for AVX-512 could be the one the linker keeps for every CPU."""
    objects = sorted((ROOT / "build").glob("**/isa_*.cpp.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("no object files of the native module, or no nm")
    for path in objects:
        lines = subprocess.run(
            ["nm", "-C", path], check=True, capture_output=True, text=True
        ).stdout.splitlines()
        weak = [line for line in lines if line[17:18] in "VvWwu" and line[17:18].strip()]
        assert not weak, f"{path.name}: {weak[:5]}"
        public = [line[19:] for line in lines if line[17:18] == "T"]
        assert public == [f"hayai::{path.name.split('.')[0][4:]}_kernels()"]
