"""Usable cores from the control group's files, and how many threads the backend makes of them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cpu_models import WIDE, compile_cpu
from hayai.backends.cores import Cores, cpu_quota, find_cores
from hayai.backends.cpu import OVERSUBSCRIPTION, CpuBackend
from hayai.errors import ConfigError


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = {"proc/self/cgroup": "0::/a/b\n"}
V1 = {"proc/self/cgroup": "4:cpu,cpuacct:/a\n"}
CFS = "sys/fs/cgroup/cpu/a/cpu.cfs"
FILES: dict[str, tuple[float | None, dict[str, str]]] = {
    "nothing": (None, {}),
    "no limit": (None, {**V2, "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}),
    "own": (1.5, {**V2, "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"}),
    "a parent's is tighter": (
        2.0, {**V2, "sys/fs/cgroup/a/b/cpu.max": "400000 100000", "sys/fs/cgroup/a/cpu.max": "200000 100000"}
    ),
    "the mount's root": (3.0, {**V2, "sys/fs/cgroup/cpu.max": "300000 100000"}),
    "version 1": (
        0.5,
        {**V1, f"{CFS}_quota_us": "50000", f"{CFS}_period_us": "100000"},
    ),
    "version 1, none": (
        None,
        {**V1, f"{CFS}_quota_us": "-1", f"{CFS}_period_us": "100000"},
    ),
    "nonsense": (None, {**V2, "sys/fs/cgroup/a/b/cpu.max": "many few"}),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_quota(name: str, tmp_path: Path) -> None:
    want, files = FILES[name]
    assert cpu_quota(write(tmp_path, files)) == want


@pytest.mark.parametrize(
    "allowed,quota,usable", [(8, None, 8), (8, 2.0, 2), (8, 2.4, 2), (8, 2.5, 3), (2, 16.0, 2), (4, 0.1, 1)]
)
def test_usable(allowed: int, quota: float | None, usable: int) -> None:
    assert Cores(16, allowed, quota).usable == usable


def test_this_machine() -> None:
    found = find_cores()
    assert 1 <= found.usable <= found.allowed <= found.online
    assert CpuBackend().threads == found.usable


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_the_affinity_mask_counts() -> None:
    one = min(os.sched_getaffinity(0))
    script = (
        f"import os; os.sched_setaffinity(0, {{{one}}})\n"
        "from hayai.backends.cpu import CpuBackend; print(CpuBackend().threads)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_more_threads_than_cores_are_said_and_bounded(caplog: pytest.LogCaptureFixture) -> None:
    usable = find_cores().usable
    assert CpuBackend(usable).threads == usable and not caplog.records
    caplog.set_level(logging.WARNING, "hayai")
    assert CpuBackend(usable + 1).threads == usable + 1
    assert f"{usable + 1} threads are more than the {usable} usable cores" in caplog.text
    backend = CpuBackend(1024)
    most = min(1024, OVERSUBSCRIPTION * usable)
    assert (backend.threads, backend.threads_asked) == (most, 1024)
    assert most == 1024 or f"{most} are used" in caplog.text
    said = compile_cpu(WIDE, "q4_1", threads=usable).describe()
    assert (said["threads"], said["threads_asked"]) == (usable, usable)
    for threads in (0, -1, 1025):
        with pytest.raises(ConfigError, match="threads must be from 1 to 1024"):
            CpuBackend(threads)


def test_a_model_that_lives_until_the_end_is_no_complaint() -> None:
    script = (
        "from cpu_models import WIDE, compile_cpu\n"
        "import threading\n"
        "kept = compile_cpu(WIDE, 'q4_1')\n"
        "threading.Thread(target=lambda: threading.Event().wait(), daemon=True).start()\n"
        "kept.itself = [kept, kept.step]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("", "")
