"""`hayai bench accuracy`: teacher-forced logits of the CPU backend against float32, on the same tokens.

The reference is the numpy backend on the file's dequantised weights: no rounded activations, float32 cache
values where it keeps them. Text is cut into windows of 512 tokens; every window starts empty, and each
token but a window's first is predicted once.

Near-tie rule: rounding activations to 8 bits moves logits by about 0.1, so another argmax counts as a
difference only where the reference prefers its own by more than NEAR_TIE. Token equality of long greedy
runs is not a criterion (docs/measuring.md).
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hayai.bench.inprocess import WINDOW, LogitRunner
from hayai.bench.peers import PeerFailure, Worker, find, read_specs
from hayai.bench.prompts import PromptSource
from hayai.errors import ConfigError

NEAR_TIE = 0.2
"""Logits. Twice the noise that int8 activations are known to carry; fixed before the measurement."""
TEXT_SUFFIXES = (".txt", ".txt.gz", ".tokens", ".tokens.gz", ".raw", ".utf8.gz")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Accuracy:
    """Over `num_tokens` predicted tokens. KL(reference || ours) in nats.

    disagreements: positions with another argmax; real_disagreements: those beyond a near tie; largest_gap:
    the reference's preference at the worst of them, in logits. peer_perplexity: by engine, same windows.
    """

    text: str
    num_tokens: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    disagreements: int
    real_disagreements: int
    largest_gap: float
    logit_noise: float
    perplexity: float
    reference_perplexity: float
    peer_perplexity: dict[str, float]

    @property
    def agreement(self) -> float:
        """Share of positions with the same argmax, near ties counted as agreement."""
        return 1.0 - self.real_disagreements / self.num_tokens


def measure(
    model: str, threads: int | None, text: str, num_tokens: int, pythons: Sequence[str], logs: Path, say: Say,
    *, source: str, isa: str | None = None,
) -> Accuracy:  # fmt: skip
    """Compare on the first `num_tokens` tokens of a text. ConfigError where the text is too short."""
    ours = LogitRunner(model, "cpu", threads, isa)
    reference = LogitRunner(model, "reference", threads)
    try:
        ids = token_ids(ours, text, num_tokens)
        windows = [ids[i : i + WINDOW] for i in range(0, len(ids) - 1, WINDOW)]
        windows = [w for w in windows if len(w) > 1]
        parts = []
        for number, window in enumerate(windows):
            say(f"window {number + 1} of {len(windows)}")
            parts.append(compare(ours, reference, window))
        path = ours.loaded.path
    finally:
        ours.close()
        reference.close()
    total = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    gaps = total["gap"]
    return Accuracy(
        text=source,
        num_tokens=len(gaps),
        kl_mean=float(total["kl"].mean()),
        kl_p99=float(np.quantile(total["kl"], 0.99)),
        kl_max=float(total["kl"].max()),
        disagreements=int(np.count_nonzero(gaps > 0)),
        real_disagreements=int(np.count_nonzero(gaps > NEAR_TIE)),
        largest_gap=float(gaps.max()),
        logit_noise=float(np.sqrt((total["noise"] ** 2).mean())),
        perplexity=math.exp(float(total["nll"].mean())),
        reference_perplexity=math.exp(float(total["reference_nll"].mean())),
        peer_perplexity=peer_perplexities(path, windows, threads, pythons, logs, say),
    )


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
    ours: LogitRunner, reference: LogitRunner, window: Sequence[int]
) -> dict[str, NDArray[np.float64]]:
    """Per predicted token of a window: KL, the reference's gap at another argmax (0 = same), noise, NLLs."""
    found: dict[str, list[NDArray[np.float64]]] = {}
    start = 0
    pairs = zip(ours.logits(window), reference.logits(window), strict=True)
    for got, wanted in pairs:
        targets = np.asarray(window[start + 1 : start + 1 + len(got)])
        for name, values in score(got[: len(targets)], wanted[: len(targets)], targets).items():
            found.setdefault(name, []).append(values)
        start += len(got)
    return {name: np.concatenate(values) for name, values in found.items()}


def score(
    got: NDArray[np.float32], wanted: NDArray[np.float32], targets: NDArray[np.int64]
) -> dict[str, NDArray[np.float64]]:
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


def peer_perplexities(
    path: Path, windows: Sequence[Sequence[int]], threads: int | None, pythons: Sequence[str], logs: Path,
    say: Say,
) -> dict[str, float]:  # fmt: skip
    """Perplexity of each installed library peer on the same file and windows, by its first settings."""
    found: dict[str, float] = {}
    for spec in read_specs().values():
        installed = find(spec, pythons) if spec.kind == "library" else ()
        if not installed:
            continue
        variant = spec.variants[0]
        context = {"n_ctx": WINDOW, "n_batch": WINDOW, "n_ubatch": WINDOW, **variant.context}
        if spec.name == "llama.cpp":
            context["n_outputs_max_per_seq"] = WINDOW
        say(f"{spec.name} on the same windows")
        logs.mkdir(parents=True, exist_ok=True)
        worker = Worker(spec.name, installed[0].python, logs / f"{spec.module}.log")
        try:
            worker.call("load", path=str(path), params=dict(variant.model))
            worker.call("context", threads=threads or 1, params=context)
            losses = worker.call("score", windows=[list(w) for w in windows])["nll"]
        except PeerFailure as error:
            say(f"{spec.name}: {error}")
            continue
        finally:
            worker.close()
        found[spec.name] = math.exp(float(np.concatenate(losses).mean()))
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
