"""Meters of the machine: CPU time of others, our own tree, peak memory; and pausing a process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hayai.bench.machine import Counters, Load, LoadMeter, cpu_seconds, own_cpu, read_counters, status_kib
from hayai.bench.peers import Pausable

SPIN = "import time\nend = time.monotonic() + {}\nwhile time.monotonic() < end: pass"


def meter_of(before: Counters, after: Counters) -> LoadMeter:
    samples = iter((before, after))
    return LoadMeter(lambda: next(samples))


@pytest.mark.parametrize(
    ("others", "steal", "contaminated"),
    [(0.0, 0.0, False), (0.11, 0.0, False), (0.1, 0.03, True), (2.0, 0.0, True)],
)
def test_load_is_busy_time_less_our_own(others: float, steal: float, contaminated: bool) -> None:
    meter = meter_of(
        Counters(clock=10.0, busy=100.0, steal=5.0, own=40.0),
        Counters(clock=11.0, busy=101.5 + others, steal=5.0 + steal, own=41.5),
    )
    meter.start()
    load = meter.stop()
    assert load.wall == pytest.approx(1.0)
    assert load.others == pytest.approx(others)
    assert load.steal == pytest.approx(steal)
    assert load.contaminated is contaminated


def test_one_tick_in_a_short_repetition_is_no_mark() -> None:
    assert not Load(wall=0.02, others=0.01, steal=0.0).contaminated
    assert Load(wall=0.02, others=0.02, steal=0.0).contaminated
    assert not Load(wall=1.0, others=0.1, steal=0.0).contaminated


def test_own_time_counts_living_and_dead_children() -> None:
    before = own_cpu()
    subprocess.run([sys.executable, "-c", SPIN.format(0.3)], check=True)
    reaped = own_cpu() - before
    child = subprocess.Popen([sys.executable, "-c", SPIN.format(30)])
    try:
        deadline = time.monotonic() + 20
        while own_cpu() - before - reaped < 10 and time.monotonic() < deadline:
            time.sleep(0.02)
        living = own_cpu() - before - reaped
    finally:
        child.kill()
        child.wait()
    assert reaped >= 1
    assert living >= 10


def test_counters_only_grow() -> None:
    first, second = read_counters(), read_counters()
    assert second.clock > first.clock
    assert second.busy >= first.busy
    assert second.own >= first.own


def test_a_process_names_its_command_as_it_likes(tmp_path: Path) -> None:
    """The command in /proc/PID/stat may hold spaces and parentheses."""
    for pid, parent, name, ticks in ((1, 0, "init", 3), (20, 1, "a (b) c", 50), (21, 20, "x", 7)):
        (tmp_path / str(pid)).mkdir()
        fields = ["0"] * 50
        fields[0], fields[1], fields[11] = "S", str(parent), str(ticks)
        (tmp_path / str(pid) / "stat").write_text(f"{pid} ({name}) {' '.join(fields)}\n")
    assert own_cpu(tmp_path, 20) == 57
    assert own_cpu(tmp_path, 1) == 60


def test_peak_memory_of_a_process_and_of_none() -> None:
    peak = status_kib(os.getpid(), "VmHWM")
    assert peak is not None and peak > 1000
    with subprocess.Popen([sys.executable, "-c", "pass"]) as gone:
        gone.wait()
    assert status_kib(gone.pid, "VmHWM") is None


def test_a_paused_process_uses_no_time_and_goes_on_later() -> None:
    paused = Pausable(subprocess.Popen([sys.executable, "-c", SPIN.format(60)]))
    pid = paused.process.pid
    try:
        deadline = time.monotonic() + 20
        while cpu_seconds(pid) < 0.1 and time.monotonic() < deadline:
            time.sleep(0.02)
        paused.pause()
        time.sleep(0.05)  # a running thread stops at its next return to the kernel
        before = cpu_seconds(pid)
        time.sleep(0.3)
        assert cpu_seconds(pid) == before
        paused.resume()
        deadline = time.monotonic() + 20
        while cpu_seconds(pid) == before and time.monotonic() < deadline:
            time.sleep(0.02)
        assert cpu_seconds(pid) > before
        assert paused.idle_cpu <= 0.05
        paused.pause()
    finally:
        paused.terminate()
    assert paused.process.returncode is not None
