"""The fuzz target itself: a short run of it, and proof that it sees failures of every kind."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import fuzz_gguf
import gguf_mutations
import pytest

from hayai.errors import ModelError

TARGET = Path(__file__).parent / "fuzz_gguf.py"
ROOT = TARGET.parents[2]

Corpus = list[gguf_mutations.Seed]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return gguf_mutations.seeds(None)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fuzz.fuzz_gguf", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("backend", ["none", "reference", "cpu"])
def test_short_run_finds_nothing(tmp_path: Path, backend: str) -> None:
    arguments = ["--cases", "200", "--seconds", "60", "--backend", backend, "--save", str(tmp_path)]
    result = run(*arguments, "--compare")
    assert result.returncode == 0, result.stdout
    assert "200 cases" in result.stdout and "accepted" in result.stdout and "0 failures" in result.stdout


def test_cases_depend_on_seed_and_number_only(corpus: Corpus) -> None:
    first = [fuzz_gguf.case_file(corpus, 3, number)[:2] for number in range(60)]
    again = [fuzz_gguf.case_file(corpus, 3, number)[:2] for number in reversed(range(60))][::-1]
    assert first == again
    assert first != [fuzz_gguf.case_file(corpus, 4, number)[:2] for number in range(60)]


def test_seeds_are_accepted_and_their_fields_are_found(tmp_path: Path, corpus: Corpus) -> None:
    """A mutation of a file that is refused anyway would test nothing."""
    for seed in corpus:
        path = tmp_path / "seed.gguf"
        path.write_bytes(seed.data)
        result = fuzz_gguf.run_file(path, Random(0), fuzz_gguf.make_backend("reference"))
        assert result == "accepted" or seed.name == "every type", seed.name
        assert seed.data[seed.header_end :].count(0) < len(seed.data)
        at, size = seed.fields[0]
        assert int.from_bytes(seed.data[at : at + size], "little") == 3  # the version


@pytest.mark.parametrize("name", gguf_mutations.MUTATIONS)
def test_every_mutation_changes_files(name: str, corpus: Corpus) -> None:
    mutation, _ = gguf_mutations.MUTATIONS[name]
    changed = 0
    for number in range(20):
        seed = corpus[number % 5]
        try:
            changed += mutation(seed, Random(number)) != seed.data
        except (ModelError, ValueError, TypeError, OverflowError):
            continue  # what `mutate` replaces by a flip of bits
    assert changed >= 8


# ---------------------------------------------------------------- failures are seen


def options(folder: Path, **changes: object) -> argparse.Namespace:
    # No limit on memory: the peak of this process is that of all tests before.
    given = fuzz_gguf.parse(["--save", str(folder), "--cases", "3", "--memory-mb", "0"])
    for name, value in changes.items():
        setattr(given, name, value)
    return given


def failing(folder: Path, case: fuzz_gguf.Case, **changes: object) -> list[str]:
    seeds = gguf_mutations.seeds(None)[:2]
    reports = fuzz_gguf.run_cases(options(folder, **changes), seeds, case)
    return [str(report["failure"]) for report in reports if "failure" in report]


def test_another_exception_is_a_failure_and_is_saved(tmp_path: Path) -> None:
    def case(path: Path, rng: Random, backend: object, compare: bool) -> str:
        raise IndexError("out of range")

    found = failing(tmp_path, case)
    assert len(found) == 3 and all("IndexError: out of range" in text for text in found)
    assert len(list(tmp_path.glob("failure-1-*.gguf"))) == 3


def test_slow_and_hanging_cases_are_failures(tmp_path: Path) -> None:
    def busy(path: Path, rng: Random, backend: object, compare: bool) -> str:
        end = time.process_time() + 0.35
        while time.process_time() < end:
            pass
        return "accepted"

    def hang(path: Path, rng: Random, backend: object, compare: bool) -> str:
        time.sleep(30)
        return "accepted"

    assert "s of processor time; allowed: 0.3" in failing(tmp_path, busy, case_seconds=0.3, cases=1)[0]
    assert "still running after" in failing(tmp_path, hang, case_seconds=0.05, cases=1)[0]


def test_much_memory_is_a_failure(tmp_path: Path) -> None:
    def case(path: Path, rng: Random, backend: object, compare: bool) -> str:
        return "accepted"

    assert "peak memory reached" in failing(tmp_path, case, memory_mb=1)[0]


def test_crash_of_the_process_is_a_failure(tmp_path: Path) -> None:
    """The child is killed from outside while it runs; the parent must name the case and go on."""
    command = [sys.executable, str(TARGET), "--cases", "100000", "--seconds", "3", "--save", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        child = None
        deadline = time.monotonic() + 20
        while child is None and time.monotonic() < deadline:
            children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
            if children and (tmp_path / "current.gguf").exists():
                child = int(children[0])
            time.sleep(0.05)
        assert child is not None
        os.kill(child, signal.SIGSEGV)
        output = parent.communicate(timeout=60)[0]
    assert parent.returncode == 1
    assert "the process ended with status -11" in output and "1 failures" in output
