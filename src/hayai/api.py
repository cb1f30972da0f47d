"""The Python API.

>>> from hayai import LLM, SamplingParams
>>> with LLM("default") as llm:                                              # doctest: +SKIP
...     print(llm.generate("The capital of France is", max_tokens=8, temperature=0).text)
...     for chunk in llm.stream("Once upon a time", max_tokens=32):
...         print(chunk.text, end="", flush=True)
...     print(llm.chat([{"role": "user", "content": "Say hello."}], max_tokens=16).text)
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, overload

from hayai.config import EngineConfig
from hayai.engine.request import SamplingParams
from hayai.errors import RequestError
from hayai.frontend import Completion, Frontend, Prompt, TextChunk
from hayai.load import load_model

__all__ = ["LLM", "Completion", "SamplingParams"]

PromptLike = str | Sequence[int] | Prompt
"""Raw text, token ids, or a Prompt."""

_PARAM_NAMES = tuple(f.name for f in fields(SamplingParams))


class LLM:
    """A model in this process.

    model: 'default' or the path of a .gguf file. The other arguments are those of
    `hayai.config.EngineConfig`; None means: chosen for this machine and model. `progress` is called with
    (what, done, in all) while the model loads.

    Sampling is given as `params` (SamplingParams), as keyword arguments of the same names, or both, the
    keywords on top. Calls may come from several threads; they share the batch.
    """

    def __init__(
        self,
        model: str = "default",
        *,
        backend: str = "cpu",
        threads: int | None = None,
        isa: str | None = None,
        context_length: int | None = None,
        max_sequences: int = EngineConfig.max_sequences,
        max_step_tokens: int = EngineConfig.max_step_tokens,
        kv_tokens: int | None = None,
        seed: int | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        config = EngineConfig(
            model=str(model),
            backend=backend,
            threads=threads,
            isa=isa,
            context_length=context_length,
            max_sequences=max_sequences,
            max_step_tokens=max_step_tokens,
            kv_tokens=kv_tokens,
            seed=seed,
        )
        self.frontend = Frontend(load_model(config, progress=progress))

    @overload
    def generate(
        self, prompt: str | Prompt, params: SamplingParams | None = None, **kw: Any
    ) -> Completion: ...
    @overload
    def generate(
        self, prompt: Sequence[int], params: SamplingParams | None = None, **kw: Any
    ) -> Completion: ...
    @overload
    def generate(
        self, prompt: Sequence[PromptLike], params: SamplingParams | None = None, **kw: Any
    ) -> list[Completion]: ...

    def generate(
        self, prompt: PromptLike | Sequence[PromptLike], params: SamplingParams | None = None, **kw: Any
    ) -> Completion | list[Completion]:
        """Continue one prompt (a Completion) or several (a list, run together).

        A prompt is raw text without a chat template, or token ids. RequestError names what is wrong.
        """
        sampling = _sampling(params, kw)
        if isinstance(prompt, str) or not isinstance(prompt, Sequence) or (prompt and type(prompt[0]) is int):
            return self.frontend.generate([_prompt(prompt)], sampling)[0]
        return self.frontend.generate([_prompt(p) for p in prompt], sampling)

    def stream(
        self, prompt: PromptLike, params: SamplingParams | None = None, **kw: Any
    ) -> Generator[TextChunk, None, None]:
        """Continue one prompt, chunk by chunk. Closing the iterator stops it."""
        return self.frontend.iterate(_prompt(prompt), _sampling(params, kw))

    def chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None, **kw: Any
    ) -> Completion:
        """Answer a conversation ({"role": ..., "content": ...}) through the model's chat template."""
        return self.frontend.generate([Prompt(messages=tuple(messages))], _sampling(params, kw))[0]

    def close(self) -> None:
        """Stop and free the memory."""
        self.frontend.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _prompt(prompt: Any) -> Prompt:
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, str):
        return Prompt(text=prompt)
    if isinstance(prompt, Sequence) and all(type(item) is int for item in prompt):
        return Prompt(token_ids=tuple(prompt))
    raise RequestError(
        f"a prompt is a string, a list of token ids or a Prompt; found {type(prompt).__name__}",
        param="prompt",
    )


def _sampling(params: SamplingParams | None, given: dict[str, Any]) -> SamplingParams:
    for name in given:
        if name not in _PARAM_NAMES:
            raise RequestError(
                f"unknown sampling parameter {name!r}; known: {', '.join(_PARAM_NAMES)}", param=name
            )
    for name in ("stop", "stop_token_ids"):
        if name in given:
            value = given[name]
            given[name] = (value,) if isinstance(value, (str, int)) else tuple(value)
    return replace(params or SamplingParams(), **given)
