"""Facts about this machine: processor, memory, page sizes (cores: backends/cores.py). Linux's /proc and /sys,
with plain answers where they are missing (other systems)."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

from hayai.backends.cores import cgroup_folders, read_text

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
class Memory:
    """Bytes; `limit` is the control group's (None: no limit)."""

    total: int
    available: int
    limit: int | None


def cpu_name(root: Path = Path("/")) -> str:
    """The processor as it calls itself."""
    match = re.search(r"^model name\s*:\s*(.+)$", read_text(root / "proc/cpuinfo"), re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def cpu_extensions(root: Path = Path("/")) -> tuple[str, ...]:
    """The extensions of ISA_FLAGS that the system reports."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", read_text(root / "proc/cpuinfo"), re.MULTILINE)
    flags = set(match[1].split()) if match else set()
    return tuple(name for name, needed in ISA_FLAGS.items() if flags.issuperset(needed))


def memory(root: Path = Path("/")) -> Memory:
    """Physical memory, what is free of it, and the control group's limit."""
    sizes = {
        name: int(kilobytes) << 10
        for name, kilobytes in re.findall(
            r"^(\w+):\s+(\d+) kB$", read_text(root / "proc/meminfo"), re.MULTILINE
        )
    }
    limits = []
    for folder in cgroup_folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = read_text(folder / name).strip()
            if text.isdigit() and int(text) < 1 << 60:
                limits.append(int(text))
    return Memory(sizes.get("MemTotal", 0), sizes.get("MemAvailable", 0), min(limits, default=None))


def huge_pages(root: Path = Path("/")) -> str:
    """The mode of transparent huge pages: always, madvise, never, or unknown."""
    text = read_text(root / "sys/kernel/mm/transparent_hugepage/enabled")
    match = re.search(r"\[(\w+)\]", text)
    return match[1] if match else "unknown"
