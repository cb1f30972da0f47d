"""The Python API.

>>> from hayai import LLM, SamplingParams
>>> with LLM("default") as llm:                                              # doctest: +SKIP
...     print(llm.generate("The capital of France is", max_tokens=8, temperature=0).text)
...     for chunk in llm.stream("Once upon a time", max_tokens=32):
...         print(chunk.text, end="", flush=True)
...     print(llm.chat([{"role": "user", "content": "Say hello."}], max_tokens=16).text)
...     print(llm.chat([{"role": "user", "content": "Yes or no?"}], choices=["yes", "no"]).text)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, overload

from hayai.config import EngineConfig
from hayai.engine.request import SamplingParams
from hayai.errors import RequestError
from hayai.frontend import Completion, Frontend, Prompt, TextChunk
from hayai.frontend_request import PLAIN, Constraint, RequestOptions, Tool, ToolCall
from hayai.load import load_model

__all__ = ["LLM", "Completion", "SamplingParams", "Tool", "ToolCall"]

PromptLike = str | Sequence[int] | Prompt
"""Raw text, token ids, or a Prompt."""

_PARAM_NAMES = tuple(f.name for f in fields(SamplingParams))
_CONSTRAINTS = {"json_schema": "json_schema", "regex": "regex", "grammar": "grammar", "choices": "choice"}


class LLM:
    """A model in this process.

    model: 'default' or the path of a .gguf file. The other arguments are those of
    `hayai.config.EngineConfig`; None means: chosen for this machine and model. `progress` is called with
    (what, done, in all) while the model loads.

    Sampling is given as `params` (SamplingParams), as keyword arguments of the same names, or both, the
    keywords on top. Calls may come from several threads; they share the batch.

    An answer can be kept to a form, by one of these keywords (RequestError where it can't be enforced):
      json_schema  a JSON schema ({} is any JSON), or a class with `model_json_schema()`: a pydantic model
      regex        a regular expression that the whole answer matches (Rust's syntax, no look-around)
      grammar      a context-free grammar: Lark in the dialect of llguidance, or llama.cpp's GBNF
      choices      a list of strings, of which the answer is one
    It may still be cut: `finish_reason` is then 'length'.

    `prompt_logprobs`, how many alternatives (0 to 20), asks for the log-probabilities of the prompt as well.
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
        kv_bytes: int | None = None,
        kv_format: str = EngineConfig.kv_format,
        prefix_cache: bool = EngineConfig.prefix_cache,
        step_ms: float | None = None,
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
            kv_bytes=kv_bytes,
            kv_format=kv_format,
            prefix_cache=prefix_cache,
            step_ms=step_ms,
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

        A prompt is raw text without a chat template, or token ids. `kw`: sampling, and the form of the answer
        (see the class). RequestError names what is wrong.
        """
        options = _options(kw)
        sampling = _sampling(params, kw)
        if isinstance(prompt, str) or not isinstance(prompt, Sequence) or (prompt and type(prompt[0]) is int):
            return self.frontend.generate([_prompt(prompt)], sampling, options)[0]
        return self.frontend.generate([_prompt(p) for p in prompt], sampling, options)

    def stream(
        self, prompt: PromptLike, params: SamplingParams | None = None, **kw: Any
    ) -> Generator[TextChunk, None, None]:
        """Continue one prompt, chunk by chunk. `kw` as for `generate`. Closing the iterator stops it."""
        options = _options(kw)
        return self.frontend.iterate(_prompt(prompt), _sampling(params, kw), options)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Tool | Mapping[str, Any]] = (),
        tool_choice: str = "auto",
        parallel_tools: bool = True,
        **kw: Any,
    ) -> Completion:
        """Answer a conversation ({"role": ..., "content": ...}) through the model's chat template.

        tools: functions that the model may call, as `Tool` or as OpenAI's API has them. tool_choice: 'auto',
        'none', 'required' (at least one call) or the name of the tool to call; the last two, and tools that
        are strict, are enforced while the answer is written. parallel_tools False: at most one call.
        Calls are in `tool_calls` of the answer, reasoning (of models whose template marks it) in `reasoning`.
        To go on, append the assistant's message with its tool_calls and one {"role": "tool",
        "tool_call_id": ..., "content": ...} for each. Other keywords as for `generate`.

        What was done otherwise than asked is a UserWarning: a chat template that knows no tools (the system
        message then describes them), a tool's schema that can't be enforced.
        """
        options = _options(kw, tools, tool_choice, parallel_tools)
        notes: list[str] = []
        prompt = Prompt(messages=tuple(messages))
        (done,) = self.frontend.generate([prompt], _sampling(params, kw), options, notes)
        for note in notes:
            warnings.warn(note, stacklevel=2)
        return done

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


def _options(
    given: dict[str, Any],
    tools: Sequence[Tool | Mapping[str, Any]] = (),
    tool_choice: str = "auto",
    parallel_tools: bool = True,
) -> RequestOptions:
    """The options in `given`, which are taken out of it."""
    forms = {name: given.pop(name) for name in _CONSTRAINTS if name in given}
    forms = {name: value for name, value in forms.items() if value is not None}
    if len(forms) > 1:
        raise RequestError(
            f"an answer has one form; given: {', '.join(forms)}",
            param=next(iter(forms)),
            code="invalid_value",
        )
    prompt_logprobs = given.pop("prompt_logprobs", None)
    if not forms and not tools and tool_choice == "auto" and prompt_logprobs is None:
        return PLAIN
    constraint = None
    for name, value in forms.items():
        schema = getattr(value, "model_json_schema", None)
        constraint = Constraint(_CONSTRAINTS[name], value if schema is None else schema(), name)  # type: ignore[arg-type]
    named = None if tool_choice in ("auto", "none", "required") else tool_choice
    return RequestOptions(
        constraint=constraint,
        tools=tuple(_tool(i, tool) for i, tool in enumerate(tools)),
        tool_choice="auto" if named is not None else tool_choice,  # type: ignore[arg-type]
        forced_tool=named,
        parallel_tools=parallel_tools,
        prompt_logprobs=prompt_logprobs,
    )


def _tool(index: int, tool: Tool | Mapping[str, Any]) -> Tool:
    if isinstance(tool, Tool):
        return tool
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(
            f"tools[{index}] must be a Tool or {{'type': 'function', 'function': {{'name': ...}}}}; "
            f"found {tool!r:.80}",
            param=f"tools[{index}]",
            code="invalid_type",
        )
    return Tool(
        function["name"],
        function.get("description") or "",
        function.get("parameters") or {},
        bool(function.get("strict")),
    )


def _sampling(params: SamplingParams | None, given: dict[str, Any]) -> SamplingParams:
    for name in given:
        if name not in _PARAM_NAMES:
            known = ", ".join([*_PARAM_NAMES, *_CONSTRAINTS, "prompt_logprobs"])
            raise RequestError(f"unknown keyword {name!r}; known: {known}", param=name)
    for name in ("stop", "stop_token_ids"):
        if name in given:
            value = given[name]
            given[name] = (value,) if isinstance(value, (str, int)) else tuple(value)
    return replace(params or SamplingParams(), **given)
