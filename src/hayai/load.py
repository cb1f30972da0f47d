"""The composition root: from options to a model that runs. Knows every layer below it.

The order is for memory: what the vocabulary is made from is freed before the weights are packed, and they
reuse it. Reading it on a second thread, beside the packing, left more memory resident after the load.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from hayai.backends.base import BLOCK_SIZE, KV_FORMATS, Backend, Limits, Runner, kv_bytes_per_token
from hayai.config import EngineConfig, Environment, ModelConfig, read_environment
from hayai.engine.engine import Engine
from hayai.engine.pacing import DECODE_STEPS, Pacer
from hayai.errors import ConfigError
from hayai.models.registry import build_plans
from hayai.plan.plan import CacheGroup, Plan, WeightSlot
from hayai.text.chat import ChatTemplate
from hayai.text.tokenizer import Tokenizer
from hayai.weights.gguf import GgufFile, model_config
from hayai.weights.loader import FileWeights
from hayai.weights.pull import resolve_model

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done, in all)."""

DEFAULT_CONTEXT = 8192
"""Context that is prepared for when none is asked for: the model's, but no more than this."""

KV_TOKENS_PER_SEQUENCE = 1024
"""Default size of the KV cache, per sequence that may run; never less than one whole context. Memory is
touched only as it is used."""

PROMPT_ROWS = 64
"""Logit rows of a step at least: how many log-probabilities of a prompt one step can give."""


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run. `engine_config` has every option resolved. tokenizer None: the file has
    no vocabulary; chat_template None: it has no template, or none was asked for. load_seconds: wall time of
    loading."""

    name: str
    path: Path
    engine: Engine
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    model_config: ModelConfig
    engine_config: EngineConfig
    plans: Mapping[str, Plan]
    formats: Mapping[str, int]
    load_seconds: float

    def describe(self) -> dict[str, object]:
        """Everything that was resolved, flat, for start-up lines, `inspect` and run cards."""
        config, limits = self.engine_config, self.engine.limits
        kv_tokens = limits.num_blocks * BLOCK_SIZE
        runner = dict(self.engine.runner.describe())
        bytes_per_token = runner.get("kv_bytes_per_token")
        if not isinstance(bytes_per_token, (int, float)):
            bytes_per_token = kv_bytes_per_token(self.engine.groups.values(), config.kv_format)
        return {
            "model": self.name,
            "path": str(self.path),
            "architecture": self.model_config.architecture,
            "layers": self.model_config.num_layers,
            "hidden_size": self.model_config.hidden_size,
            "vocab_size": self.model_config.vocab_size,
            "weights": ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in self.formats.items()),
            "tokenizer": "none" if self.tokenizer is None else f"{self.tokenizer.vocab_size} tokens",
            "chat_template": "none" if self.chat_template is None else "from the file",
            "context_length": self.engine.max_length,
            "model_context_length": self.model_config.context_length,
            "max_sequences": config.max_sequences,
            "max_step_tokens": config.max_step_tokens,
            "kv_tokens": kv_tokens,
            "kv_format": config.kv_format,
            "kv_mib_when_full": round(kv_tokens * bytes_per_token / 2**20, 1),
            "prefix_cache": _prefix_cache(config, self.engine),
            "mixed_step": _mixed_step(config),
            "seed": "random" if config.seed is None else config.seed,
            "load_seconds": round(self.load_seconds, 3),
            **{f"backend.{key}": value for key, value in runner.items()},
        }


def load_model(config: EngineConfig, *, progress: Progress | None = None, chat: bool = True) -> LoadedModel:
    """Load a model and make it ready to run.

    progress: called with (what, done, in all) while it takes long. chat False: leave the chat template
    unread, for a caller that has no use for it. ModelError: no such file, or one that can't be run;
    ConfigError: options that don't fit; PlanError: an op that the backend lacks.
    """
    began = time.perf_counter()
    environment = read_environment()
    _check_options(config)
    path = resolve_model(config.model, environment.home)
    with GgufFile(path) as file:
        shape = model_config(file)
        config = _resolve(config, shape, environment)
        # Before anything that stays: what the vocabulary is made from leaves no holes between it.
        tokenizer, template = _read_text(file, chat)
        plans = build_plans(shape, "gguf")
        slots: dict[str, WeightSlot] = {}
        groups: dict[str, CacheGroup] = {}
        for plan in plans.values():
            slots |= plan.slots
            groups |= plan.groups
        limits = _limits(config, groups.values())
        backend = BACKENDS[config.backend](config, progress)
        runner = backend.compile(plans, FileWeights(file, "gguf", slots), limits)
        try:
            end_ids = _end_ids(tokenizer, file.metadata)
            _check_budget(config, limits, runner)
            engine = Engine(
                runner,
                limits,
                groups,
                end_ids=end_ids,
                seed=config.seed,
                prefix_cache=config.prefix_cache,
                pacer=Pacer(config.step_ms),
            )
        except BaseException:
            runner.close()
            raise
        formats: Counter[str] = Counter()
        for info in file.tensors.values():
            formats[info.format] += info.nbytes
    return LoadedModel(
        name=path.stem,
        path=path,
        engine=engine,
        tokenizer=tokenizer,
        chat_template=template,
        model_config=shape,
        engine_config=config,
        plans=plans,
        formats=dict(formats.most_common()),
        load_seconds=time.perf_counter() - began,
    )


# ---------------------------------------------------------------- backends


def _cpu(config: EngineConfig, progress: Progress | None) -> Backend:
    from hayai.backends.cpu import CpuBackend  # the native core is loaded only where it is used

    packing = None if progress is None else partial(progress, "packing weights")
    return CpuBackend(config.threads, config.isa, packing)


def _reference(config: EngineConfig, progress: Progress | None) -> Backend:
    from hayai.backends.reference import ReferenceBackend  # for checking, not for speed

    return ReferenceBackend()


BACKENDS: Mapping[str, Callable[[EngineConfig, Progress | None], Backend]] = {
    "cpu": _cpu,
    "reference": _reference,
}


# ---------------------------------------------------------------- options

LARGEST: Mapping[str, int] = {
    "threads": 1024,
    "context_length": 1 << 24,
    "max_sequences": 1 << 12,
    "max_step_tokens": 1 << 16,
    "kv_tokens": 1 << 26,
    "kv_bytes": 1 << 44,
    "step_ms": 60_000,
}
"""The most that each option may ask for: what its bookkeeping is made for."""


def _check_options(config: EngineConfig) -> None:
    if config.backend not in BACKENDS:
        raise ConfigError(f"there is no backend {config.backend!r}; there are: {', '.join(BACKENDS)}")
    for name, most in LARGEST.items():
        value = getattr(config, name)
        if value is not None and not 1 <= value <= most:
            raise ConfigError(f"{name} must be from 1 to {most}: {value}")
    if config.kv_format not in KV_FORMATS:
        raise ConfigError(f"kv_format must be {' or '.join(KV_FORMATS)}: {config.kv_format!r}")
    if config.kv_tokens is not None and config.kv_bytes is not None:
        raise ConfigError(
            f"kv_tokens ({config.kv_tokens}) and kv_bytes ({config.kv_bytes}) both size the cache: give one"
        )


def _resolve(config: EngineConfig, shape: ModelConfig, environment: Environment) -> EngineConfig:
    """The options with every None replaced, but `threads` and `isa`, which the backend chooses."""
    context = config.context_length or min(shape.context_length, DEFAULT_CONTEXT)
    if context > shape.context_length:
        raise ConfigError(f"context_length is {context}, but the model was made for {shape.context_length}")
    return replace(
        config,
        threads=config.threads or environment.threads,
        isa=config.isa or environment.isa,
        context_length=context,
        # A step has room for one token of every sequence, whatever was asked for.
        max_step_tokens=max(config.max_step_tokens, config.max_sequences),
        kv_tokens=None
        if config.kv_bytes
        else config.kv_tokens or max(context, KV_TOKENS_PER_SEQUENCE * config.max_sequences),
    )


def _limits(config: EngineConfig, groups: Collection[CacheGroup]) -> Limits:
    assert config.context_length is not None
    if config.kv_bytes is not None:
        block = kv_bytes_per_token(groups, config.kv_format) * BLOCK_SIZE
        num_blocks = config.kv_bytes // block if block else -(-LARGEST["kv_tokens"] // BLOCK_SIZE)
        if num_blocks < 1:
            raise ConfigError(
                f"kv_bytes is {config.kv_bytes}, but {BLOCK_SIZE} tokens of this model take {block} bytes in "
                f"{config.kv_format}"
            )
    else:
        assert config.kv_tokens is not None
        num_blocks = -(-config.kv_tokens // BLOCK_SIZE)
    return Limits(
        max_tokens=config.max_step_tokens,
        max_sequences=config.max_sequences,
        max_rows=max(config.max_sequences, min(PROMPT_ROWS, config.max_step_tokens)),
        num_blocks=num_blocks,
        max_context=config.context_length,
        kv_format=config.kv_format,
    )


def _check_budget(config: EngineConfig, limits: Limits, runner: Runner) -> None:
    """Hold the backend to the budget: what it says a token takes may differ from `kv_bytes_per_token`."""
    said = runner.describe().get("kv_bytes_per_token")
    if config.kv_bytes is not None and isinstance(said, (int, float)):
        taken = said * limits.num_blocks * BLOCK_SIZE
        if taken > config.kv_bytes:
            raise ConfigError(
                f"kv_bytes is {config.kv_bytes}, but its {limits.num_blocks} blocks take {taken:.0f} on the "
                f"{config.backend} backend: size the cache by kv_tokens"
            )


def _prefix_cache(config: EngineConfig, engine: Engine) -> str:
    if not config.prefix_cache:
        return "off"
    return "on" if engine.keeps_prefixes else "off: a state holds the last position only"


def _mixed_step(config: EngineConfig) -> str:
    return f"{DECODE_STEPS:g} decode steps" if config.step_ms is None else f"{config.step_ms:g} ms"


# ---------------------------------------------------------------- text


def _read_text(file: GgufFile, chat: bool) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """Vocabulary and chat template. Their lists are dropped from the metadata: a hundred thousand strings,
    whose memory the rest of loading can use."""
    tokenizer = Tokenizer.from_metadata(file.metadata)
    template = None
    if tokenizer is not None and chat:
        template = ChatTemplate.from_metadata(file.metadata, tokenizer)
    for key in [key for key, value in file.metadata.items() if isinstance(value, list)]:
        del file.metadata[key]
    gc.collect()  # also empties the interpreter's free lists, which hold on to its arenas
    return tokenizer, template


def _end_ids(tokenizer: Tokenizer | None, metadata: Mapping[str, object]) -> frozenset[int]:
    """Tokens that end a turn; without a vocabulary the one that the file names, if any."""
    if tokenizer is not None:
        return tokenizer.end_ids
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    return frozenset({eos}) if isinstance(eos, int) else frozenset()
