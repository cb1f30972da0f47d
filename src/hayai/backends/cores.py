"""Cores that this process may really use: affinity mask and control group. The one place that knows.

Linux's /proc and /sys, versions 1 and 2 of control groups; plain answers where they are missing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


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
        """Threads that can run at the same time: at least 1. Half a processor of quota counts as one."""
        limit = self.allowed if self.quota is None else min(self.allowed, int(self.quota + 0.5))
        return max(1, limit)


def find_cores(root: Path = Path("/")) -> Cores:
    """Processors: online, allowed by the affinity mask, paid for by the control group."""
    online = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else online
    return Cores(online, allowed, cpu_quota(root))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The tightest CPU quota of our control group and its parents, in processors; None: none is set."""
    found: list[float] = []
    for folder in cgroup_folders(root, "cpu"):
        fields = read_text(folder / "cpu.max").split()
        if not fields:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            fields = [read_text(folder / name).strip() for name in names]
        if len(fields) == 2 and all(field.isdigit() for field in fields) and int(fields[1]):
            found.append(int(fields[0]) / int(fields[1]))
    return min(found, default=None)


def cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Our control group's folder and its parents, under version 2 and under version 1."""
    folders: list[Path] = []
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = ([*line.split(":", 2), "", ""])[:3]
        if controllers == "":
            base = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        inside = Path(path.lstrip("/"))
        # inside a container the path may be the host's, which we can't see: the mount's root is ours then
        folders += [base / part for part in (inside, *inside.parents) if ".." not in part.parts]
    return folders


def read_text(path: Path) -> str:
    """The file's text, '' where it can't be read."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
