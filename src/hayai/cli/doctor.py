"""`hayai doctor`: what this machine has, how fast it reads memory, what is missing and how to mend it."""

from __future__ import annotations

import importlib
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

import click

import hayai
from hayai.backends.cores import Cores, find_cores
from hayai.cli import machine
from hayai.cli.console import human_bytes
from hayai.config import Environment, read_environment
from hayai.weights.default_model import MODEL_BYTES, default_model_path

READ_BYTES = 512 << 20
"""Read per repetition: far above any cache."""
READ_REPEATS = 5

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """One line. `mend`: the one command that mends it, where something is wrong. `data`: for --json."""

    name: str
    state: str
    text: str
    mend: str | None = None
    data: dict[str, Any] = field(default_factory=dict)


@click.command()
@click.option("--quick", is_flag=True, help="Don't measure the read bandwidth.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(quick: bool, as_json: bool) -> None:
    """Check this machine. Exit code 1 where something is missing, with the command that mends it."""
    findings = list(examine(quick=quick))
    if as_json:
        click.echo(json.dumps([asdict(f) for f in findings], indent=2))
    else:
        width = max(len(f.name) for f in findings)
        for finding in findings:
            click.echo(f"{finding.state:<5} {finding.name:<{width}}  {finding.text}")
            if finding.mend is not None:
                click.echo(f"{'':<5} {'':<{width}}  mend: {finding.mend}")
    if any(f.state == FAIL for f in findings):
        sys.exit(1)


def examine(*, quick: bool) -> Iterator[Finding]:
    """Every finding, in the order of reading."""
    environment = read_environment()
    native = _native()
    yield Finding(
        "hayai", OK, f"{hayai.__version__}, Python {platform.python_version()}, {platform.platform()}"
    )
    yield _processor()
    yield _core(native, environment)
    cores = find_cores()
    yield _cores(cores, environment)
    yield _memory()
    yield _huge_pages()
    if native is not None and not quick:
        yield _bandwidth(native, environment.threads or cores.usable)
    yield _model(environment)


def _native() -> ModuleType | None:
    try:
        return importlib.import_module("hayai._native")
    except ImportError:
        return None


def _processor() -> Finding:
    extensions = machine.cpu_extensions()
    text = f"{machine.cpu_name()}, {platform.machine()}; {' '.join(extensions) or 'no known extensions'}"
    return Finding("processor", OK, text, data={"extensions": extensions})


def _core(native: ModuleType | None, environment: Environment) -> Finding:
    if native is None:
        text = "the compiled core is missing; only --backend reference works"
        return Finding("core", FAIL, text, "pip install . (needs a C++17 compiler)")
    isa = native.Executor(environment.isa or "", 1, 1, 1, 16).isa
    lowered = f", lowered by HAYAI_ISA={environment.isa}" if environment.isa else ""
    state = WARN if isa == "scalar" else OK
    return Finding("core", state, f"{isa} kernels{lowered}", data={"isa": isa})


def _cores(cores: Cores, environment: Environment) -> Finding:
    quota = "no quota" if cores.quota is None else f"quota of {cores.quota:g}"
    text = f"{cores.usable} usable: {cores.online} online, {cores.allowed} in our affinity mask, {quota}"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    text += f"; load average {load:.1f}"
    state = OK
    if environment.threads is not None:
        text += f"; HAYAI_THREADS={environment.threads}"
        if environment.threads > cores.usable:
            text, state = text + ", more than there are cores: slow", WARN
    return Finding("cores", state, text, data={**asdict(cores), "usable": cores.usable, "load": load})


def _memory() -> Finding:
    memory = machine.memory()
    text = f"{human_bytes(memory.total)}, {human_bytes(memory.available)} available"
    if memory.limit is not None:
        text += f", limit of the control group {human_bytes(memory.limit)}"
    free = memory.available if memory.limit is None else min(memory.available, memory.limit)
    state = WARN if 0 < free < 4 * MODEL_BYTES else OK
    return Finding("memory", state, text, data=asdict(memory))


def _huge_pages() -> Finding:
    mode = machine.huge_pages()
    if mode in ("always", "madvise"):
        return Finding("huge pages", OK, mode, data={"mode": mode})
    mend = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled" if mode == "never" else None
    return Finding("huge pages", WARN, f"{mode}; weights are read more slowly", mend, {"mode": mode})


def _bandwidth(native: ModuleType, threads: int) -> Finding:
    read: Callable[..., list[float]] = native.read_bandwidth
    rates: dict[int, float] = {}
    for count in sorted({1, threads}):
        seconds = statistics.median(read(READ_BYTES, count, True, READ_REPEATS))
        rates[count] = READ_BYTES / seconds / 1e9
    shown = ", ".join(f"{n} thread{'s' * (n > 1)} {rate:.1f} GB/s" for n, rate in rates.items())
    text = f"{shown} (median of {READ_REPEATS}, {human_bytes(READ_BYTES)} each)"
    return Finding("read bandwidth", OK, text, data={str(n): round(rate, 3) for n, rate in rates.items()})


def _model(environment: Environment) -> Finding:
    path = default_model_path(environment.home)
    data = {"path": str(path)}
    if not path.is_file():
        return Finding("default model", FAIL, f"not in the cache: {path}", "hayai pull", data)
    size = path.stat().st_size
    if size != MODEL_BYTES:
        text = f"damaged: {path} has {size} bytes, not {MODEL_BYTES}"
        return Finding("default model", FAIL, text, "hayai pull", data)
    return Finding("default model", OK, str(path), data=data)
