"""Facts about this machine: processor, cores that we may use, memory, page sizes. Linux's /proc and /sys,
with plain answers where they are missing (other systems)."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "vnni": ("avx512_vnni",),
    "avx_vnni": ("avx_vnni",),
    "bf16": ("avx512_bf16",),
    "amx": ("amx_tile", "amx_int8"),
    "neon": ("asimd",),
    "sve": ("sve",),
}
"""Extension as it is spoken of -> flags of /proc/cpuinfo that it needs, all of them."""


@dataclass(frozen=True)
class Cores:
    """How many processors there are, and how many of them we may use.

    quota: processors' worth of time that the control group allows (None: no limit).
    """

    online: int
    allowed: int
    quota: float | None

    @property
    def usable(self) -> int:
        """Threads that can run at the same time: at least 1."""
        limit = self.allowed if self.quota is None else min(self.allowed, int(self.quota + 0.5))
        return max(1, limit)


@dataclass(frozen=True)
class Memory:
    """Bytes; `limit` is the control group's (None: no limit)."""

    total: int
    available: int
    limit: int | None


def cpu_name(root: Path = Path("/")) -> str:
    """The processor as it calls itself."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def cpu_extensions(root: Path = Path("/")) -> tuple[str, ...]:
    """The extensions of ISA_FLAGS that the system reports."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    flags = set(match[1].split()) if match else set()
    return tuple(name for name, needed in ISA_FLAGS.items() if flags.issuperset(needed))


def cores(root: Path = Path("/")) -> Cores:
    """Processors: online, allowed by the affinity mask, paid for by the control group."""
    online = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else online
    return Cores(online, allowed, cpu_quota(root))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The tightest CPU quota of our control group and its parents, in processors; None: none is set."""
    found: list[float] = []
    for folder in _cgroup_folders(root, "cpu"):
        fields = _read(folder / "cpu.max").split()
        if not fields:
            fields = [
                _read(folder / "cpu.cfs_quota_us").strip(),
                _read(folder / "cpu.cfs_period_us").strip(),
            ]
        if len(fields) == 2 and all(f.isdigit() for f in fields) and int(fields[1]):
            found.append(int(fields[0]) / int(fields[1]))
    return min(found, default=None)


def memory(root: Path = Path("/")) -> Memory:
    """Physical memory, what is free of it, and the control group's limit."""
    sizes = {
        name: int(kilobytes) << 10
        for name, kilobytes in re.findall(r"^(\w+):\s+(\d+) kB$", _read(root / "proc/meminfo"), re.MULTILINE)
    }
    limits = []
    for folder in _cgroup_folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name).strip()
            if text.isdigit() and int(text) < 1 << 60:
                limits.append(int(text))
    return Memory(sizes.get("MemTotal", 0), sizes.get("MemAvailable", 0), min(limits, default=None))


def huge_pages(root: Path = Path("/")) -> str:
    """The mode of transparent huge pages: always, madvise, never, or unknown."""
    text = _read(root / "sys/kernel/mm/transparent_hugepage/enabled")
    match = re.search(r"\[(\w+)\]", text)
    return match[1] if match else "unknown"


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Our control group's folder and its parents, under version 2 and under version 1."""
    folders: list[Path] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = ([*line.split(":", 2), "", ""])[:3]
        if controllers == "":
            base = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        inside = Path(path.lstrip("/"))
        # inside a container the path may be the host's, which we can't see: the mount's root is ours then
        folders += [base / p for p in (inside, *inside.parents) if ".." not in p.parts]
    return folders


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
