"""What the machine was doing while we measured: CPU time of others, steal, peak memory, identity.

Linux only (/proc). Figures of /proc/stat have a resolution of one tick (10 ms) per core.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

CONTAMINATED_SHARE = 0.12
"""Limit fixed beforehand: others' CPU time plus steal above this share of one core marks a repetition."""
BLIND_SECONDS = 0.015
"""One tick of /proc/stat (10 ms) may be rounding: less than two is never a mark."""


@dataclass(frozen=True)
class Load:
    """CPU use around one repetition, in seconds: wall time, other processes, steal by the hypervisor."""

    wall: float
    others: float
    steal: float

    @property
    def contaminated(self) -> bool:
        foreign = self.others + self.steal
        return foreign > BLIND_SECONDS and foreign > CONTAMINATED_SHARE * self.wall


@dataclass(frozen=True)
class Counters:
    """CPU seconds since boot: busy (all processes), steal, and our own process tree; and the clock."""

    clock: float
    busy: float
    steal: float
    own: float


def tick_seconds() -> float:
    return 1.0 / float(os.sysconf("SC_CLK_TCK"))


def read_counters(root: Path = Path("/proc")) -> Counters:
    """Sample /proc; `own` is this process with all its descendants, dead ones included once reaped."""
    tick = tick_seconds()
    fields = (root / "stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(f) for f in fields[:8])
    return Counters(
        time.perf_counter(), (user + nice + system + irq + softirq) * tick, steal * tick, own_cpu(root) * tick
    )


def own_cpu(root: Path = Path("/proc"), pid: int | None = None) -> int:
    """Ticks used by the process tree below `pid` (default: this process)."""
    pid = os.getpid() if pid is None else pid
    parents: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for entry in root.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # the command name is in parentheses and may hold spaces and parentheses itself
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        child = int(entry.name)
        parents.setdefault(int(fields[1]), []).append(child)
        # utime stime cutime cstime: own and of children already waited for
        ticks[child] = sum(int(f) for f in fields[11:15])
    total, waiting = 0, [pid]
    while waiting:
        current = waiting.pop()
        total += ticks.get(current, 0)
        waiting.extend(parents.get(current, ()))
    return total


class LoadMeter:
    """Measures a Load between `start()` and `stop()`; `read` is replaceable for tests."""

    def __init__(self, read: Callable[[], Counters] = read_counters) -> None:
        self._read = read
        self._before: Counters | None = None

    def start(self) -> None:
        self._before = self._read()

    def stop(self) -> Load:
        """CPU use since `start()`."""
        assert self._before is not None, "stop() before start()"
        before, after = self._before, self._read()
        busy = after.busy - before.busy
        own = after.own - before.own
        return Load(after.clock - before.clock, max(0.0, busy - own), max(0.0, after.steal - before.steal))


def status_kib(pid: int, field: str, root: Path = Path("/proc")) -> int | None:
    """A memory field of /proc/PID/status (VmHWM, VmRSS ...) in KiB; None once the process is gone."""
    try:
        text = (root / str(pid) / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    for line in text.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    return None


def cpu_seconds(pid: int, root: Path = Path("/proc")) -> float:
    """CPU time that a process has used itself (no children), in seconds."""
    fields = (root / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * tick_seconds()


def usable_cores() -> tuple[int, ...]:
    """The cores that this process may run on."""
    return tuple(sorted(os.sched_getaffinity(0)))


def identity() -> Mapping[str, str | int | float]:
    """The machine, for the report's disclosure."""
    info = _first_values(Path("/proc/cpuinfo"), ("model name", "flags", "cpu MHz", "cache size"))
    memory = _first_values(Path("/proc/meminfo"), ("MemTotal",))
    flags = set(info.get("flags", "").split())
    wanted = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": info.get("model name", platform.processor() or "unknown"),
        "mhz_seen": info.get("cpu MHz", "unknown"),
        "cache": info.get("cache size", "unknown"),
        "isa": " ".join(f for f in wanted if f in flags),
        "hypervisor": "yes" if "hypervisor" in flags else "no",
        "cores": len(usable_cores()),
        "memory": memory.get("MemTotal", "unknown"),
        "huge_pages": huge.read_text().strip() if huge.exists() else "unknown",
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _first_values(path: Path, names: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in names:
                found.setdefault(name.strip(), value.strip())
    return found
