"""Facts about a machine, read from made-up /proc and /sys trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from hayai.backends.cores import Cores, cpu_quota, find_cores
from hayai.cli import machine
from hayai.cli.console import human_bytes, print_error, speed_line
from hayai.engine.request import RequestTiming


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_extensions_need_all_their_flags(tmp_path: Path) -> None:
    root = tree(
        tmp_path, {"proc/cpuinfo": "model name\t: Some CPU\nflags\t\t: sse2 avx2 fma avx512f amx_tile\n"}
    )
    assert machine.cpu_name(root) == "Some CPU"
    assert machine.cpu_extensions(root) == ()
    tree(tmp_path, {"proc/cpuinfo": "flags\t: avx2 fma f16c avx512_vnni\n"})
    assert machine.cpu_extensions(root) == ("avx2", "vnni")
    assert machine.cpu_extensions(tmp_path / "nowhere") == ()


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
            },
            2.0,
        ),
        ({"proc/self/cgroup": "0::/host/only\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3.0),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/x\n2:memory:/x\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({"proc/self/cgroup": "garbage\n\n0::\n", "sys/fs/cgroup/cpu.max": "1 0\n"}, None),
    ],
)
def test_cpu_quota(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert cpu_quota(tree(tmp_path, files)) == quota


def test_usable_cores_are_at_least_one() -> None:
    assert Cores(8, 4, None).usable == 4
    assert Cores(8, 4, 2.0).usable == 2
    assert Cores(8, 4, 0.2).usable == 1
    assert find_cores().usable >= 1


def test_memory_and_huge_pages(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/meminfo": "MemTotal:  1000 kB\nMemAvailable:   500 kB\nHugePages_Total: 3\n",
            "proc/self/cgroup": "0::/x\n",
            "sys/fs/cgroup/memory.max": "max\n",
            "sys/fs/cgroup/x/memory.max": "4096\n",
            "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        },
    )
    assert machine.memory(root) == machine.Memory(1000 << 10, 500 << 10, 4096)
    assert machine.huge_pages(root) == "madvise"
    assert machine.memory(tmp_path / "no") == machine.Memory(0, 0, None)
    assert machine.huge_pages(tmp_path / "no") == "unknown"


def test_sizes_and_speeds_as_people_read_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert [human_bytes(n) for n in (0, 999, 1000, 98_362_432, 123_456_789, 5e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "98.4 MB",
        "123 MB",
        "5000 GB",
    ]
    timing = RequestTiming(10.0, 10.5, 11.5, 13.5, prompt_tokens=30, cached_tokens=10, output_tokens=5)
    assert speed_line(timing) == (
        "prompt 30 tokens (10 cached) · 20 tokens/s · first token 1,500 ms · answer 5 tokens · 2.0 tokens/s"
    )
    single = RequestTiming(1.0, 1.0, 2.0, 2.0, prompt_tokens=4, output_tokens=1)
    assert speed_line(single) == "prompt 4 tokens · 4 tokens/s · first token 1,000 ms · answer 1 tokens"
    print_error("it broke\nhint: mend it")
    assert capsys.readouterr().err == "error: it broke\nhint: mend it\n"
