"""Kernel speeds by hand: `python tests/kernels/bench_kernels.py [--isa avx2] [--threads 2]`.

Every figure stands beside the read bandwidth of the same process and thread count, measured around it (rounds
are interleaved), because a shared host's bandwidth moves between minutes. Best of the rounds; GB/s counts
weight or cache bytes, GMAC/s multiply-adds of the matrix product.
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from kernel_harness import (
    KERNELS,
    LAYOUTS,
    Array,
    Layout,
    aligned,
    even_up,
    group_bytes,
    pack,
    random_activations,
)

ROUNDS = 7
MATRICES = ((3072, 576), (576, 1536))
"""Shapes of the default model's largest matrices."""


def huge(nbytes: int) -> Array:
    """Memory on 2 MB pages where the system gives them."""
    region = mmap.mmap(-1, even_up(nbytes, 1 << 21) + (1 << 21))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    start = -np.frombuffer(region, np.uint8).ctypes.data % (1 << 21)
    return np.frombuffer(region, np.uint8, nbytes, start)


def pin(index: int) -> None:
    """Bind the calling thread to one core: two short tasks would otherwise often share one."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[index % len(cores)]})


class Team:
    """Pinned threads; `best(work)` runs work(t) on each and returns the fewest seconds of all rounds."""

    def __init__(self, threads: int) -> None:
        self.members = [ThreadPoolExecutor(1, initializer=pin, initargs=(t,)) for t in range(threads)]

    def best(self, work: Callable[[int], Any]) -> float:
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for task in [member.submit(work, t) for t, member in enumerate(self.members)]:
                task.result()
            times.append(time.perf_counter() - start)
        return min(times)


class Bench:
    def __init__(self, isa: str, threads: int) -> None:
        self.kernels = KERNELS[isa]
        self.threads = threads
        self.team = Team(threads)
        self.rng = np.random.default_rng(0)

    def read(self, megabytes: float) -> None:
        data = huge(int(megabytes * 1e6))
        data[:] = 1
        parts = np.array_split(data, self.threads)
        seconds = self.team.best(lambda t: self.kernels.read_bytes(parts[t], 1))
        print(f"  read {megabytes:.0f} MB: {data.nbytes / seconds / 1e9:.1f} GB/s")

    def weights(self, layout: Layout, rows: int, cols: int, copies: int) -> list[Array]:
        """`copies` packed matrices behind each other, one array each."""
        packed = pack(layout, self.kernels.group_rows, layout.random(self.rng, rows, cols), cols)
        store = huge(len(packed) * copies)
        for i in range(copies):
            store[i * len(packed) : (i + 1) * len(packed)] = packed
        return [store[i * len(packed) : (i + 1) * len(packed)] for i in range(copies)]

    def gemm(
        self, name: str, tokens: int, rows: int, cols: int, copies: int, repeats: int
    ) -> tuple[float, float]:
        """GB/s and GMAC/s; copies > 1 stream different matrices, repeats > 1 stay in the cache."""
        layout = LAYOUTS[name]
        share = even_up(rows // self.threads, self.kernels.group_rows)
        stores = [self.weights(layout, share, cols, copies) for _ in range(self.threads)]
        a = random_activations(self.kernels, self.rng, tokens, cols, layout)
        empty_q, empty = np.zeros(0, np.int8), np.zeros(0, np.float32)
        q, scale, total = (empty_q, empty, empty) if layout.is_float else a.tiles()
        outs = [aligned((tokens, share)) for _ in range(self.threads)]

        def work(t: int) -> None:
            for w in stores[t]:
                if tokens == 1:
                    self.kernels.gemv(
                        layout.id, w, cols, a.q[0], a.scale[0], a.sum[0], a.x[0], outs[t][0], repeats
                    )
                else:
                    self.kernels.gemm(layout.id, w, cols, tokens, q, scale, total, a.x, outs[t], repeats)

        seconds = self.team.best(work)
        times = copies * repeats / seconds / 1e9
        total_rows = share * self.threads
        weight_bytes = (
            group_bytes(layout, self.kernels.group_rows, cols) * total_rows // self.kernels.group_rows
        )
        return weight_bytes * times, total_rows * cols * tokens * times

    def attention(self, tokens: int, context: int, heads: int, dim: int) -> tuple[float, float]:
        """The last `tokens` positions of a context, one kv head per thread, 30 layers of cache."""
        layers = 30
        blocks = even_up(context, 64) // 16
        page = 16 * 2 * dim * 2
        store = huge(self.threads * layers * blocks * page)
        store.view(np.float16)[:] = 0.5
        pages = store.reshape(self.threads, layers, blocks, page)
        table = np.arange(blocks, dtype=np.int32)
        q = self.rng.normal(size=(tokens, heads, dim)).astype(np.float32)
        step = min(tokens, 16)
        outs = [(aligned(step * heads * dim), aligned(step * heads * 2)) for _ in range(self.threads)]

        def work(t: int) -> None:
            for layer in range(layers):
                for at in range(0, tokens, step):
                    part = q[at : at + step].reshape(-1)
                    first = context - tokens + at
                    last = (first + step - 1) // 64 + 1
                    self.kernels.attend(
                        part, step, heads, dim, dim, first, 0, 0, last, pages[t, layer], table, dim**-0.5,
                        0.0, *outs[t],
                    )  # fmt: skip

        seconds = self.team.best(work)
        positions = sum(context - tokens + i + 1 for i in range(tokens)) * heads
        macs = 2 * positions * dim * layers * self.threads
        return self.threads * layers * context * 4 * dim / seconds / 1e9, macs / seconds / 1e9


def products(bench: Bench, name: str, kinds: tuple[str, ...]) -> None:
    for rows, cols in MATRICES:
        copies = max(1, int(90e6 / (group_bytes(LAYOUTS[name], 1, cols) * rows)))
        what = f"  {name:5} {rows}x{cols}"
        if "gemv" in kinds:
            cold, hot = bench.gemm(name, 1, rows, cols, copies, 1), bench.gemm(name, 1, rows, cols, 1, 200)
            print(f"{what} gemv {cold[0]:6.1f} GB/s from memory {hot[1]:7.1f} GMAC/s in cache")
        for tokens in (2, 3, 4, 8, 16, 64, 256) if "gemm" in kinds else ():
            cold = bench.gemm(name, tokens, rows, cols, max(1, copies // (1 + tokens // 16)), 1)
            hot = bench.gemm(name, tokens, rows, cols, 1, max(1, 200 // tokens))
            print(f"{what} M={tokens:3} {cold[1]:6.1f} GMAC/s from memory {hot[1]:7.1f} in cache")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", choices=sorted(KERNELS), action="append")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layouts", default="q4_1,q4_0,q8_0,f16,f32")
    parser.add_argument("--only", choices=["gemv", "gemm", "attention"], action="append")
    args = parser.parse_args()
    kinds = tuple(args.only or ("gemv", "gemm", "attention"))
    for isa in args.isa or [isa for isa in KERNELS if isa != "scalar"]:
        bench = Bench(isa, args.threads)
        print(f"{isa}, {args.threads} threads")
        bench.read(98)
        for name in args.layouts.split(","):
            products(bench, name, kinds)
        if "attention" in kinds:
            for tokens, context in ((1, 256), (1, 1024), (1, 4096), (16, 512), (512, 512)):
                gbs, gmacs = bench.attention(tokens, context, 3, 64)
                print(f"  attention tokens={tokens} context={context}: {gbs:.1f} GB/s, {gmacs:.1f} GMAC/s")
        bench.read(98)


if __name__ == "__main__":
    main()
