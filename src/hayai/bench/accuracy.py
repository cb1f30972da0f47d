"""`hayai bench accuracy`: teacher-forced logits of the CPU backend against float32, on the same tokens.

The reference is the numpy backend on the file's dequantised weights: no rounded activations, float32 cache
values where it keeps them. Text is cut into windows of 512 tokens; every window starts empty, and each
token but a window's first is predicted once.

Near-tie rule: rounding activations to 8 bits moves logits by about 0.1, so another argmax counts as a
difference only where the reference prefers its own by more than NEAR_TIE. Token equality of long greedy
runs is not a criterion (docs/measuring.md).
"""

from __future__ import annotations

import contextlib
import gzip
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hayai.bench.inprocess import LOGIT_ROWS, WINDOW, LogitRunner
from hayai.bench.peers import PeerFailure, Worker, find, read_specs
from hayai.bench.prompts import PromptSource
from hayai.errors import ConfigError

NEAR_TIE = 0.2
"""Logits. Twice the noise that int8 activations are known to carry; fixed before the measurement."""
TEXT_SUFFIXES = (".txt", ".txt.gz", ".tokens", ".tokens.gz", ".raw", ".utf8.gz")

Say = Callable[[str], None]


@dataclass(frozen=True)
class EngineAccuracy:
    """One engine against the reference. KL(reference || engine) in nats; noise in logits (root mean square).

    disagreements: positions with another argmax; real_disagreements: those beyond a near tie; largest_gap:
    the reference's preference at the worst of them, in logits. excess: perplexity over the reference's, less
    one; excess_error: its standard error over tokens (paired, delta method).
    """

    name: str
    kl_mean: float
    kl_p99: float
    kl_max: float
    disagreements: int
    real_disagreements: int
    largest_gap: float
    noise: float
    perplexity: float
    excess: float
    excess_error: float


@dataclass(frozen=True)
class Accuracy:
    """Over `num_tokens` predicted tokens; engines[0] is our CPU backend, the others are peers on the same
    file. over_peers: our perplexity over a peer's, less one, with its paired standard error."""

    text: str
    num_tokens: int
    reference_perplexity: float
    engines: tuple[EngineAccuracy, ...]
    over_peers: Mapping[str, tuple[float, float]]

    @property
    def agreement(self) -> float:
        """Our share of positions with the reference's argmax, near ties counted as agreement."""
        return 1.0 - self.engines[0].real_disagreements / self.num_tokens


class LogitSource(Protocol):
    """Whoever gives teacher-forced logits."""

    def logits(self, window: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Logits (at most LOGIT_ROWS, vocab) of a window, from an empty cache."""
        ...

    def close(self) -> None: ...


Scores = dict[str, NDArray[np.float64]]


def measure(
    model: str, threads: int, text: str, num_tokens: int, pythons: Sequence[str], logs: Path, say: Say,
    *, source: str, isa: str | None = None,
) -> Accuracy:  # fmt: skip
    """Compare on the first `num_tokens` tokens of a text. ConfigError where the text is too short."""
    with contextlib.ExitStack() as stack:
        ours = LogitRunner(model, "cpu", threads, isa)
        stack.callback(ours.close)
        reference = LogitRunner(model, "reference", threads)
        stack.callback(reference.close)
        engines: dict[str, LogitSource] = {"cpu": ours}
        for name, peer in open_peers(ours.loaded.path, threads, pythons, logs, say).items():
            stack.callback(peer.close)
            engines[name] = peer
        ids = token_ids(ours, text, num_tokens)
        windows = [ids[i : i + WINDOW] for i in range(0, len(ids) - 1, WINDOW)]
        scores = score_windows([w for w in windows if len(w) > 1], reference, engines, say)
    return Accuracy(
        source,
        len(scores["cpu"]["nll"]),
        math.exp(float(scores["cpu"]["reference_nll"].mean())),
        tuple(engine_accuracy(name, found) for name, found in scores.items()),
        {name: excess(scores["cpu"]["nll"], found["nll"]) for name, found in scores.items() if name != "cpu"},
    )


def score_windows(
    windows: Sequence[Sequence[int]], reference: LogitSource, engines: Mapping[str, LogitSource], say: Say
) -> dict[str, Scores]:
    """Scores of every engine over all predicted tokens. A peer that fails is named and left out."""
    parts: dict[str, list[Scores]] = {name: [] for name in engines}
    for number, window in enumerate(windows):
        say(f"window {number + 1} of {len(windows)}")
        wanted = list(reference.logits(window))
        for name in tuple(parts):
            try:
                parts[name].append(compare(engines[name].logits(window), wanted, window))
            except PeerFailure as error:
                say(f"{name}: {error}")
                del parts[name]
    return {
        name: {key: np.concatenate([part[key] for part in found]) for key in found[0]}
        for name, found in parts.items()
    }


def engine_accuracy(name: str, total: Scores) -> EngineAccuracy:
    gaps = total["gap"]
    return EngineAccuracy(
        name,
        float(total["kl"].mean()),
        float(np.quantile(total["kl"], 0.99)),
        float(total["kl"].max()),
        int(np.count_nonzero(gaps > 0)),
        int(np.count_nonzero(gaps > NEAR_TIE)),
        float(gaps.max()),
        float(np.sqrt((total["noise"] ** 2).mean())),
        math.exp(float(total["nll"].mean())),
        *excess(total["nll"], total["reference_nll"]),
    )


def excess(nll: NDArray[np.float64], base: NDArray[np.float64]) -> tuple[float, float]:
    """(perplexity over the base's, less one; its standard error over tokens, paired)."""
    difference = nll - base
    ratio = math.exp(float(difference.mean()))
    return ratio - 1.0, ratio * float(difference.std()) / math.sqrt(len(difference))


def token_ids(runner: LogitRunner, text: str, count: int) -> list[int]:
    """The first `count` ids of the text; ConfigError where there are fewer."""
    tokenizer = runner.loaded.tokenizer
    if tokenizer is None:
        raise ConfigError(f"{runner.loaded.path.name} has no vocabulary, so a text can't be scored")
    ids = list(tokenizer.encode(text, special=False))[:count]
    if len(ids) < count:
        raise ConfigError(f"the text has {len(ids)} tokens; {count} are needed")
    return ids


# ---------------------------------------------------------------- one window


def compare(
    got: Iterable[NDArray[np.float32]], wanted: Iterable[NDArray[np.float32]], window: Sequence[int]
) -> Scores:
    """Per predicted token of a window: KL, the reference's gap at another argmax (0 = same), noise, NLLs."""
    found: dict[str, list[NDArray[np.float64]]] = {}
    start = 0
    for ours, reference in zip(got, wanted, strict=True):
        targets = np.asarray(window[start + 1 : start + 1 + len(ours)])
        if len(targets):
            for name, values in score(ours[: len(targets)], reference[: len(targets)], targets).items():
                found.setdefault(name, []).append(values)
        start += len(ours)
    return {name: np.concatenate(values) for name, values in found.items()}


def score(got: NDArray[np.float32], wanted: NDArray[np.float32], targets: NDArray[np.int64]) -> Scores:
    """Compare logits (n, vocab) with reference logits, in float64. noise: root mean square of the logit
    difference after its mean, which no softmax sees, is taken out."""
    ours, ref = log_softmax(got), log_softmax(wanted)
    rows = np.arange(len(targets))
    difference = got.astype(np.float64) - wanted
    return {
        "kl": (np.exp(ref) * (ref - ours)).sum(axis=1),
        "gap": ref.max(axis=1) - ref[rows, got.argmax(axis=1)],
        "noise": difference.std(axis=1),
        "nll": -ours[rows, targets],
        "reference_nll": -ref[rows, targets],
    }


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


# ---------------------------------------------------------------- peers and texts


class PeerLogits:
    """A library peer's logits, handed over in a file: a window's are 100 MB, too much for a pipe of text."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._folder = tempfile.TemporaryDirectory(prefix="hayai-")

    def logits(self, window: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        path = str(Path(self._folder.name) / "logits.npy")
        self._worker.call("logits", window=list(window), path=path)
        found: NDArray[np.float32] = np.load(path, mmap_mode="r")
        for start in range(0, len(found), LOGIT_ROWS):
            yield found[start : start + LOGIT_ROWS]

    def close(self) -> None:
        self._worker.close()
        self._folder.cleanup()


def open_peers(
    path: Path, threads: int, pythons: Sequence[str], logs: Path, say: Say
) -> dict[str, PeerLogits]:  # fmt: skip
    """Each installed library peer on the same file, by the first settings of its table."""
    found: dict[str, PeerLogits] = {}
    for spec in read_specs().values():
        installed = find(spec, pythons) if spec.kind == "library" else ()
        if not installed:
            continue
        variant = spec.variants[0]
        context = {"n_ctx": WINDOW, "n_batch": WINDOW, "n_ubatch": WINDOW, **variant.context}
        if spec.name == "llama.cpp":
            context["n_outputs_max_per_seq"] = WINDOW
        logs.mkdir(parents=True, exist_ok=True)
        worker = Worker(spec.name, installed[0].python, logs / f"{spec.module}.log")
        try:
            worker.call("load", path=str(path), params=dict(variant.model))
            worker.call("context", threads=threads, params=context)
        except PeerFailure as error:
            say(f"{spec.name}: {error}")
            worker.close()
            continue
        found[spec.name] = PeerLogits(worker)
    return found


def read_text(folder: Path | None, least_characters: int) -> tuple[str, str]:
    """(text, where from): a folder's first text file, or made-up sentences. ConfigError: no such file."""
    if folder is None:
        return PromptSource(7, 1 << 15).text(least_characters // 5), "made-up sentences, seed 7"
    files = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    for path in files:
        if path.name.endswith(TEXT_SUFFIXES):
            raw = path.read_bytes()
            text = gzip.decompress(raw) if path.suffix == ".gz" else raw
            return text.decode("utf-8", "replace"), path.name
    raise ConfigError(f"no text file under {folder}; looked for {', '.join(TEXT_SUFFIXES)}")
