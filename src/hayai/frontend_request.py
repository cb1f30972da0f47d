"""What a caller may ask of the frontend beside prompt and sampling: tools, a grammar, its place in the queue.

One neutral form for every wire format: the server's dialects translate into it and never past it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from hayai.engine.request import MAX_LOGPROBS
from hayai.errors import RequestError

THINKING_TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


def thinking_tags(template: str) -> tuple[str, str] | None:
    """What stands around the reasoning of a model with this chat template; None where it knows of none."""
    return next((tags for tags in THINKING_TAGS if tags[1] in template), None)


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. parameters: a JSON schema of an object. strict: the arguments are
    forced into the schema while they are written."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False


ToolChoice = Literal["auto", "none", "required"]


@dataclass(frozen=True)
class Constraint:
    """A form that the answer must have.

    kind and value: 'json' any JSON object (None), 'json_schema' a schema, 'regex' a pattern, 'grammar' a Lark
    grammar in llguidance's dialect or a GBNF one, 'choice' a list of strings. param: the field that an error
    names, as the caller spells it.
    """

    kind: Literal["json", "json_schema", "regex", "grammar", "choice"]
    value: Any = None
    param: str = ""


class ToolCallDelta(NamedTuple):
    """A piece of a tool call. The first piece of each call has `call_id` and `name`; `arguments` are pieces
    of one JSON text."""

    call_index: int
    arguments: str = ""
    call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class ToolCall:
    """A whole call of a finished answer. arguments: JSON text as the model wrote it."""

    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class RequestOptions:
    """Everything about a request that is neither prompt nor sampling.

    priority, tenant, cache_salt, deadline: see engine.request.EngineRequest. constraint: the answer's form.
    tools and tool_choice: 'required' forces a call, `forced_tool` that one; parallel_tools False: one call at
    most. reasoning: split the model's thinking from its answer where its template marks it.
    prompt_logprobs: log-probabilities of the prompt itself, with so many alternatives. generate False: only
    score the prompt (one token is sampled and dropped).
    """

    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    deadline: float | None = None
    constraint: Constraint | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = "auto"
    forced_tool: str | None = None
    parallel_tools: bool = True
    reasoning: bool = True
    prompt_logprobs: int | None = None
    generate: bool = True

    def __post_init__(self) -> None:
        if self.prompt_logprobs is not None and not 0 <= self.prompt_logprobs <= MAX_LOGPROBS:
            raise RequestError(
                f"prompt_logprobs must be from 0 to {MAX_LOGPROBS}: {self.prompt_logprobs!r}",
                param="prompt_logprobs",
                code="invalid_value",
            )
        names = [tool.name for tool in self.tools]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise RequestError(f"two tools are named {twice!r}", param="tools", code="invalid_value")
        if self.forced_tool is not None and self.forced_tool not in names:
            raise RequestError(
                f"tool_choice names {self.forced_tool!r}, which is not among the tools: "
                f"{', '.join(names) or 'there are none'}",
                param="tool_choice",
                code="invalid_value",
            )
        if self.tool_choice == "required" and not names:
            raise RequestError(
                "tool_choice is 'required', but there are no tools", param="tool_choice", code="invalid_value"
            )

    @property
    def active_tools(self) -> tuple[Tool, ...]:
        """The tools that may be called in this answer."""
        if self.forced_tool is not None:
            return tuple(tool for tool in self.tools if tool.name == self.forced_tool)
        return () if self.tool_choice == "none" else self.tools

    @property
    def needs_grammar(self) -> bool:
        """Whether the answer is bound to a form while it is written."""
        if self.constraint is not None or self.forced_tool is not None:
            return True
        return self.tool_choice == "required" or any(tool.strict for tool in self.active_tools)


PLAIN = RequestOptions()
"""Nothing special: the path that costs nothing."""
