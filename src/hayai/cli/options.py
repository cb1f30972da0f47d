"""Options that several verbs share, and how they become a configuration."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

from hayai.cli.console import Progress
from hayai.config import EngineConfig, read_environment
from hayai.errors import ModelError
from hayai.load import LoadedModel, load_model
from hayai.weights.pull import default_model_path, pull_default

Function = TypeVar("Function", bound=Callable[..., Any])

ENGINE_OPTIONS = (
    click.option("--model", "-m", default="default", show_default=True, help="A .gguf file, or 'default'."),
    click.option("--pull", is_flag=True, help="Fetch the default model first if it is missing."),
    click.option(
        "--threads",
        "-t",
        type=click.IntRange(1, 1024),
        help="Compute threads. [default: the cores we may use]",
    ),
    click.option(
        "--context",
        type=click.IntRange(min=2),
        help="Context length in tokens. [default: the model's, as memory allows]",
    ),
    click.option("--isa", type=click.Choice(("scalar", "avx2", "avx512")), help="Lower the instruction set."),
    click.option(
        "--backend",
        type=click.Choice(("cpu", "reference")),
        default="cpu",
        show_default=True,
        help="'reference' is the slow numpy oracle.",
    ),
)

SAMPLING_OPTIONS = (
    click.option(
        "--max-tokens",
        "-n",
        type=click.IntRange(min=1),
        default=512,
        show_default=True,
        help="Longest answer.",
    ),
    click.option(
        "--temperature", type=float, default=0.0, show_default=True, help="0 = always the likeliest token."
    ),
    click.option("--top-p", type=float, default=1.0, show_default=True, help="Nucleus sampling."),
    click.option(
        "--top-k", type=int, default=0, show_default=True, help="Only the k likeliest tokens; 0 = off."
    ),
    click.option(
        "--min-p",
        type=float,
        default=0.0,
        show_default=True,
        help="Only tokens at least this likely against the likeliest.",
    ),
    click.option("--repetition-penalty", type=float, default=1.0, show_default=True, help="1 = off."),
    click.option("--seed", type=int, help="Makes sampling repeatable. [default: random]"),
)

SAMPLING_FIELDS = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
"""The options above as SamplingParams spells them."""


def engine_options(function: Function) -> Function:
    """Add --model, --pull, --threads, --context, --isa and --backend."""
    return _apply(function, ENGINE_OPTIONS)


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the sampling options; the function gets them as one dictionary `sampling`, for SamplingParams."""

    @functools.wraps(function)
    def gather(**options: Any) -> Any:
        sampling = {name: options.pop(name) for name in SAMPLING_FIELDS}
        return function(sampling=sampling, **options)

    return _apply(gather, SAMPLING_OPTIONS)


def _apply(function: Function, options: tuple[Any, ...]) -> Function:
    for option in reversed(options):
        function = option(function)
    return function


def load(
    *,
    model: str,
    pull: bool,
    threads: int | None,
    context: int | None,
    isa: str | None,
    backend: str,
    chat: bool = True,
    **more: Any,
) -> LoadedModel:
    """Load what the options say. chat: see load_model; `more`: EngineConfig fields."""
    config = EngineConfig(
        model=model, backend=backend, threads=threads, isa=isa, context_length=context, **more
    )
    return load_engine(config, pull=pull, chat=chat)


def load_engine(config: EngineConfig, *, pull: bool = False, chat: bool = True) -> LoadedModel:
    """Load a model, with a progress bar where it takes long. pull: fetch the default model if it is missing.
    chat: see load_model."""
    home = read_environment().home
    missing = config.model == "default" and not default_model_path(home).is_file()
    if missing and not pull:
        raise ModelError(
            f"the default model is not in the cache: {default_model_path(home)}\n"
            "hint: run `hayai pull` to fetch it, or name a file: --model PATH.gguf"
        )
    with Progress() as progress:
        if missing:
            pull_default(home, progress)
        return load_model(config, progress=progress, chat=chat)
