"""Fuzz target: hostile GGUF files, from the container to the kernels.

    python -m tests.fuzz.fuzz_gguf --seconds 60 --cases 10000 [--seed N] [--backend none|reference|cpu]

Each case is a mutation of a valid file (gguf_mutations.py). It goes through GgufFile, model_config, a read
of every tensor and Tokenizer.from_metadata; with --backend also through the plans, the packing of all weights
and one step of 4 tokens. A ModelError (PlanError and ConfigError from a backend) is the right answer to a bad
file; anything else is a failure: another exception, a crash, a case that takes too long or too much memory.
With --compare, logits are also compared with the reference backend's, where no weight is extreme.
Failures are saved with their number, the exit code is then 1. Case i depends only on --seed and i, so a
failure is run again with --first i --cases 1.

The cases run in a child process under a memory limit, so that a crash of native code is seen and named too.
For an address-sanitiser build, run with --memory-mb 0 (its shadow memory needs the address space).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import re
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import FrameType
from typing import IO

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from gguf_mutations import Seed, mutate, seeds
from numpy.typing import NDArray

from hayai.backends.base import Backend, Limits, SamplingRow, StepInput
from hayai.backends.reference import ReferenceBackend
from hayai.config import ModelConfig, read_environment
from hayai.errors import ConfigError, HayaiError, ModelError, PlanError
from hayai.models.registry import build_plans
from hayai.text.chat import ChatTemplate
from hayai.text.tokenizer import Tokenizer
from hayai.weights.default_model import default_model_path
from hayai.weights.gguf import GgufFile, model_config
from hayai.weights.loader import FileWeights

MAX_FAILURES = 20
REAL_HEADER_SHARE = 0.02
"""Cases that start from the default model's header: its 98,000 strings make them fifty times as slow."""
STEP_TOKENS = 4
MAX_ERROR = 0.05
"""RMS difference of logits against their RMS. A wrong kernel gives about 1."""
MAX_WEIGHT = 100.0
"""Larger weights are not compared: where numbers overflow, the order of a sum decides what comes out."""


Floats = NDArray[np.float32]
Case = Callable[[Path, Random, Backend | None, bool], str]


class CaseTimeout(BaseException):
    """Not an Exception, so that no handler on the way swallows it."""


def on_alarm(signum: int, frame: FrameType | None) -> None:
    raise CaseTimeout


# ---------------------------------------------------------------- one case


def run_file(path: Path, rng: Random, backend: Backend | None, compare: bool = False) -> str:
    """Take one file as far as it gets; returns the stage that refused it, or 'accepted'."""
    stage = "container"
    try:
        with GgufFile(path) as file:
            largest = largest_weight(file)
            stage = "tokenizer"
            run_text(file, rng)
            stage = "config"
            config = model_config(file)
            if backend is not None:
                stage = "backend"
                logits = run_step(file, config, backend)
                if compare and largest < MAX_WEIGHT:
                    check_logits(logits, file, config)
    except ModelError as error:
        return f"{stage}: {kind_of(error)}"
    return "accepted"


def largest_weight(file: GgufFile) -> float:
    """Read and decode every tensor; the largest magnitude in them, infinite where there is a NaN."""
    peaks = [np.abs(file.read(name).dequantize()).max() for name in file.tensors]
    return float(np.nan_to_num(peaks, nan=np.inf, posinf=np.inf).max()) if peaks else 0.0


def run_text(file: GgufFile, rng: Random) -> None:
    """Tokenizer and chat template; a file whose vocabulary is refused may still hold a good model."""
    with contextlib.suppress(ModelError):
        tokenizer = Tokenizer.from_metadata(file.metadata)
        if tokenizer is None:
            return
        text = rng.choice(("hello world", "日本語 \0 <|im_end|>", "a" * 500, ""))
        for special in (False, True):
            tokenizer.decode(tokenizer.encode(text, special=special))
        with contextlib.suppress(HayaiError):
            template = ChatTemplate.from_metadata(file.metadata, tokenizer)
            if template is not None:
                template.render([{"role": "user", "content": text}])


def run_step(file: GgufFile, config: ModelConfig, backend: Backend) -> Floats:
    """Load the model and run one step, as a prompt of a few tokens would; the logits of its last token."""
    count = min(STEP_TOKENS, config.context_length)
    limits = Limits(max_tokens=8, max_sequences=1, max_rows=2, num_blocks=4, max_context=64)
    try:
        plans = build_plans(config)
        slots = {name: slot for plan in plans.values() for name, slot in plan.slots.items()}
        runner = backend.compile(plans, FileWeights(file, "gguf", slots), limits)
    except (PlanError, ConfigError) as error:
        raise ModelError(str(error)) from error
    try:
        step = StepInput(
            token_ids=np.arange(count, dtype=np.int32) % config.vocab_size,
            positions=np.arange(count, dtype=np.int32),
            query_start=np.array([0, count], np.int32),
            block_tables={name: np.arange(4, dtype=np.int32)[None] for name in plans["main"].groups},
            logit_rows=np.array([count - 1], np.int32),
            sampling=(SamplingRow(),),
            want_logits=True,
        )
        output = runner.step(step)
        token = int(output.tokens[0])
        if not 0 <= token < config.vocab_size:
            raise AssertionError(f"token {token} of a vocabulary of {config.vocab_size}")
        assert output.logits is not None
        return output.logits
    finally:
        runner.close()


def check_logits(found: Floats, file: GgufFile, config: ModelConfig) -> None:
    """Compare with the reference, whose activations are either float32 or int8: a format that a backend
    expands at load has the former, one that it runs as it is the latter."""
    if found.size < 8:
        return  # too few to tell an error from rounding
    errors = []
    for rounded in (False, True):
        wanted = run_step(file, config, ReferenceBackend(quantize_activations=rounded))
        size = np.sqrt(np.mean(np.square(wanted, dtype=np.float64)))
        errors.append(float(np.sqrt(np.mean(np.square(found - wanted, dtype=np.float64))) / (size + 1e-6)))
    if not min(errors) < MAX_ERROR:
        raise AssertionError(f"logits differ from the reference's: relative RMS {min(errors):.3g}")


def kind_of(error: ModelError) -> str:
    """The message without what differs from file to file, to count how many kinds were reached."""
    text = re.sub(r"^\S+\.gguf:? ", "", str(error)).split("; supported")[0]
    text = re.sub(r"'[^']*'|\"[^\"]*\"|\[.*\]", "_", text)
    return re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "#", text)[:60]


def make_backend(name: str) -> Backend | None:
    """Imported here: the native backend must not be needed to fuzz the reader."""
    if name == "cpu":
        from hayai.backends.cpu import CpuBackend

        return CpuBackend(threads=2, isa=read_environment().isa)
    if name == "reference":
        from hayai.backends.reference import ReferenceBackend

        return ReferenceBackend()
    return None


# ---------------------------------------------------------------- many cases


def case_file(corpus: list[Seed], seed: int, number: int) -> tuple[str, bytes, Random]:
    """(what was done, the file's bytes, generator for the rest of the case)."""
    rng = Random(f"{seed}:{number}")
    real = [s for s in corpus if s.name == "real header"]
    tiny = [s for s in corpus if s.name != "real header"]
    source = real[0] if real and rng.random() < REAL_HEADER_SHARE else rng.choice(tiny)
    how, data = mutate(source, rng)
    return f"{source.name}, {how}", data, rng


def run_cases(
    options: argparse.Namespace, corpus: list[Seed], run: Case = run_file
) -> Iterator[dict[str, object]]:
    """Run the cases one by one; yields {case, how, result or failure} after each."""
    backend = make_backend(options.backend)
    current = Path(options.save) / "current.gguf"
    end = time.monotonic() + options.seconds
    for number in range(options.first, options.first + options.cases):
        if time.monotonic() > end:
            return
        how, data, rng = case_file(corpus, options.seed, number)
        current.write_bytes(data)
        outcome = watched(lambda rng=rng: run(current, rng, backend, options.compare), options.case_seconds)
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        too_much = options.memory_mb and peak_mb > options.memory_mb
        if too_much and "failure" not in outcome:
            outcome = {"failure": f"peak memory reached {peak_mb} MiB; allowed: {options.memory_mb}"}
        if "failure" in outcome:
            keep(Path(options.save), options.seed, number)
        yield {"case": number, "how": how, **outcome}
        if too_much:
            return  # the peak never falls again: a fresh process goes on


def watched(case: Callable[[], str], seconds: float) -> dict[str, str]:
    """Run one case within its time; {'result': ...} or {'failure': ...}."""
    previous = signal.signal(signal.SIGALRM, on_alarm)
    began = time.process_time()
    signal.setitimer(signal.ITIMER_REAL, 4 * seconds)
    try:
        with np.errstate(all="ignore"):
            result = case()
    except CaseTimeout:
        return {"failure": f"still running after {4 * seconds} s\n{traceback.format_exc()}"}
    except Exception:
        return {"failure": traceback.format_exc()}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    took = time.process_time() - began
    if took > seconds:
        return {"failure": f"took {took:.1f} s of processor time; allowed: {seconds}"}
    return {"result": result}


def work(options: argparse.Namespace) -> int:
    """The child: run cases, one JSON line each."""
    if options.memory_mb:
        # Address space is more than memory: thread stacks and reserved arenas count, untouched.
        limit = (options.memory_mb + 4096) << 20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.WARNING)  # a backend says how it runs each of the formats
    model = default_model_path(read_environment().home)
    corpus = seeds(model if model.is_file() else None)
    print(json.dumps({"ready": len(corpus)}), flush=True)
    for report in run_cases(options, corpus):
        print(json.dumps(report), flush=True)
    return 0


def lines_of(child: subprocess.Popen[str], output: IO[str], silence: float) -> Iterator[str]:
    """Lines as they come; ends when the child does, or when it says nothing for `silence` seconds."""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while selector.select(silence):
            line = output.readline()
            if not line:
                return
            yield line
    child.kill()


def supervise(options: argparse.Namespace) -> int:
    """The parent: run children until all cases are done, gather counts, save what fails."""
    began = time.monotonic()
    save = Path(options.save)
    save.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    failures: list[tuple[int, str, str]] = []
    next_case, last = options.first, options.first + options.cases
    while next_case < last and len(failures) < MAX_FAILURES:
        left = options.seconds - (time.monotonic() - began)
        if left <= 0:
            break
        command = [
            sys.executable, __file__, "--worker", "--seed", str(options.seed), "--save", str(save),
            "--first", str(next_case), "--cases", str(last - next_case), "--seconds", str(left),
            "--backend", options.backend, "--memory-mb", str(options.memory_mb),
            "--case-seconds", str(options.case_seconds), *(["--compare"] if options.compare else []),
        ]  # fmt: skip
        ready, start = False, next_case
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in lines_of(child, child.stdout, 60 + 8 * options.case_seconds):
                report = json.loads(line)
                if not ready:
                    ready = "ready" in report
                    continue
                next_case = report["case"] + 1
                if "failure" in report:
                    failures.append((report["case"], report["how"], report["failure"]))
                    if len(failures) >= MAX_FAILURES:
                        child.kill()
                        break
                else:
                    counts[report["result"]] += 1
        if not ready:
            print(f"the child ended with status {child.returncode} before its first case")
            return 1
        if child.returncode != 0 and len(failures) < MAX_FAILURES:
            failures.append((next_case, "", f"the process ended with status {child.returncode}"))
            keep(save, options.seed, next_case)
            next_case += 1
        elif next_case == start:
            break  # out of time before the first case
    return show(options, counts, failures, next_case - options.first, time.monotonic() - began)


def keep(save: Path, seed: int, number: int) -> None:
    """Keep the current file as the failure's reproducer."""
    current = save / "current.gguf"
    if current.exists():
        current.replace(save / f"failure-{seed}-{number}.gguf")


def show(
    options: argparse.Namespace,
    counts: Counter[str],
    failures: list[tuple[int, str, str]],
    done: int,
    seconds: float,
) -> int:
    stages: Counter[str] = Counter()
    for result, count in counts.items():
        stages[result.split(":")[0]] += count
    kinds = len([result for result in counts if result != "accepted"])
    print(f"{done} cases in {seconds:.0f} s (seed {options.seed}, backend {options.backend})")
    for stage, count in stages.most_common():
        print(f"  {stage + ('' if stage == 'accepted' else ' refused'):22} {count}")
    print(f"  kinds of ModelError    {kinds}")
    if options.verbose:
        for result, count in counts.most_common():
            print(f"    {count:6} {result}")
    for number, how, failure in failures:
        print(f"\nFAILURE in case {number} ({how}), saved in {options.save}:\n{failure}")
    print(f"{len(failures)} failures")
    return 1 if failures else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fuzz the GGUF reader and what stands behind it.")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=300, help="stop after this time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--backend", choices=("none", "reference", "cpu"), default="none")
    parser.add_argument("--compare", action="store_true", help="compare logits with the reference's")
    parser.add_argument("--save", default=str(Path(tempfile.gettempdir()) / "hayai-fuzz"), metavar="DIR")
    parser.add_argument("--memory-mb", type=int, default=1024, help="peak memory allowed; 0 = no limit")
    parser.add_argument("--case-seconds", type=float, default=5, help="processor time of one case")
    parser.add_argument("--verbose", action="store_true", help="list every kind of error")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return work(options) if options.worker else supervise(options)


if __name__ == "__main__":
    raise SystemExit(main())
