"""Anthropic's wire format, inwards: bodies of /v1/messages and /v1/messages/count_tokens -> one neutral Job.

Scalars are checked by pydantic in strict mode; system, messages (anthropic_messages.py) and tools by hand, so
that an error names the exact place. Answers are written by anthropic_replies.py. Extensions, all optional:
seed, min_p, repetition_penalty, ignore_eos, cache_salt, timings.

Where the same word means something else here: cache_control is accepted and changes nothing, since the prefix
of every prompt is cached; thinking that was not asked for is switched off where the model's template can.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from hayai.config import LimitsConfig
from hayai.engine.request import MAX_STOP_STRINGS, SamplingParams
from hayai.errors import RequestError
from hayai.frontend import Prompt
from hayai.frontend_request import PLAIN, Constraint, RequestOptions, Tool, ToolChoice
from hayai.server.anthropic_messages import (
    MESSAGES_SCHEMA,
    TEXT_SCHEMA,
    check_cache_control,
    read_conversation,
)
from hayai.server.anthropic_replies import AnswerForm
from hayai.server.bodies import FieldTable, read_object, validate
from hayai.server.fields import kind_of, refuse
from hayai.server.job import Job
from hayai.server.openai_tools import check_schema

_STRICT = ConfigDict(strict=True, extra="forbid")
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")

FIELDS = FieldTable(
    warned={
        "metadata": ("end users are not tracked", ({}, {"user_id": None})),
        "service_tier": ("there is one tier; priority belongs to the key", ("auto", "standard_only")),
        "diagnostics": ("cache misses are not explained", ()),
        "inference_geo": ("the model runs where this server runs", ("not_available", "global")),
        "speed": ("there is one speed, the fastest", ("standard",)),
    },
    refused={
        "container": ("this server runs no code", ()),
        "context_management": ("the conversation is taken as it is", ({}, {"edits": []})),
        "compaction": ("the conversation is taken as it is", ()),
        "fallbacks": ("no other model is asked", ([],)),
        "fallback_credit_token": ("no other model is asked", ()),
        "billing_policy": ("nothing is billed", ()),
        "mcp_servers": ("this server calls no others", ([],)),
        "thread": ("conversations are not stored", ()),
    },
)
"""Fields of the API, stable and beta, that the models below don't have."""


class Thinking(BaseModel):
    """Whether the model may think before it answers, and whether the client gets to read it."""

    model_config = _STRICT

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int | None, Field(ge=1)] = None
    display: Literal["summarized", "omitted"] | None = None


class ToolChoiceBody(BaseModel):
    """Whether the model has to call a tool, and how many."""

    model_config = _STRICT

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class JsonFormat(BaseModel):
    """The answer is JSON of this schema."""

    model_config = _STRICT

    type: Literal["json_schema"]
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(BaseModel):
    """The form of the answer."""

    model_config = _STRICT

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


_TOOLS_SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": f"^{_TOOL_NAME.pattern}$"},
            "description": {"type": "string"},
            "input_schema": {"type": "object"},
            "strict": {"type": "boolean"},
            "type": {"enum": ["custom"]},
        },
        "required": ["name", "input_schema"],
    },
}


class CountTokensRequest(BaseModel):
    """Body of POST /v1/messages/count_tokens: what goes into the prompt."""

    model_config = _STRICT

    model: str | None = None
    messages: Annotated[Any, WithJsonSchema(MESSAGES_SCHEMA)]
    system: Annotated[Any, WithJsonSchema(TEXT_SCHEMA)] = None
    tools: Annotated[Any, WithJsonSchema(_TOOLS_SCHEMA)] = None
    tool_choice: ToolChoiceBody | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Annotated[Any, WithJsonSchema({"type": "object"})] = None


class MessagesRequest(CountTokensRequest):
    """Body of POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=0)]
    stream: bool = False
    stop_sequences: list[str] = []
    temperature: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    output_format: JsonFormat | None = None
    # extensions
    seed: Annotated[int | None, Field(ge=0, le=(1 << 64) - 1)] = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    cache_salt: Annotated[str, Field(max_length=256)] = ""
    timings: bool = False


@dataclass(frozen=True)
class AskedPrompt:
    """What the model is given. prefill: how the answer begins, or None."""

    model: str | None
    prompt: Prompt
    options: RequestOptions
    prefill: str | None
    warnings: tuple[str, ...]


def parse_messages(
    raw: bytes, limits: LimitsConfig, *, template_knows_effort: bool = False
) -> tuple[Job, str | None]:
    """A body of /v1/messages as a Job, and how its answer begins where the client says so.

    RequestError names the field at fault.
    """
    fields, warnings = FIELDS.sort(read_object(raw), MessagesRequest.model_fields)
    body = validate(MessagesRequest, fields)
    asked = _asked(body, limits, warnings, template_knows_effort)
    constraint = _constraint(body, limits)
    if constraint is not None and asked.prefill is not None:
        refuse("messages", "an answer in a given format can't be continued: end with a turn of the user's")
    options = replace(
        asked.options,
        constraint=constraint,
        generate=body.max_tokens > 0,
        cache_salt=body.cache_salt,
    )
    shown = body.thinking is None or body.thinking.display != "omitted"
    job = Job(
        dialect="anthropic",
        model=body.model,
        prompts=(asked.prompt,),
        params=_sampling(body, limits),
        stream=body.stream,
        include_usage=True,
        timings=body.timings,
        options=options,
        warnings=asked.warnings,
        extra={"form": AnswerForm(body.max_tokens, shown)},
    )
    return job, asked.prefill


def parse_count(raw: bytes, limits: LimitsConfig, *, template_knows_effort: bool = False) -> AskedPrompt:
    """A body of /v1/messages/count_tokens. RequestError names the field at fault."""
    fields, warnings = FIELDS.sort(read_object(raw), CountTokensRequest.model_fields)
    return _asked(validate(CountTokensRequest, fields), limits, warnings, template_knows_effort)


def _asked(
    body: CountTokensRequest, limits: LimitsConfig, warnings: list[str], template_knows_effort: bool
) -> AskedPrompt:
    """What both bodies share: the conversation, the tools, whether to think."""
    check_cache_control(body.cache_control, "cache_control")
    conversation = read_conversation(body.system, body.messages, limits)
    tools = _tools(body.tools, limits, warnings)
    options = _options(tools, body.tool_choice)
    if body.thinking is not None and body.thinking.budget_tokens is not None:
        warnings.append("thinking.budget_tokens: thinking ends by itself, or at max_tokens")
    args: dict[str, object] = {}
    thinks = _THINKS["disabled" if body.thinking is None else body.thinking.type]
    if thinks is not None:
        args = dict.fromkeys(_SWITCHES, thinks)
    if body.output_config is not None and body.output_config.effort is not None:
        if template_knows_effort:
            args["reasoning_effort"] = body.output_config.effort
        else:
            warnings.append("output_config.effort: this model's chat template has no levels of reasoning")
    prompt = Prompt(messages=conversation.messages, template_args=args)
    return AskedPrompt(body.model, prompt, options, conversation.prefill, tuple(warnings))


_SWITCHES = ("enable_thinking", "thinking")
"""What chat templates call the variable that switches thinking on and off."""
_THINKS: Mapping[str, bool | None] = {
    "enabled": True,
    "between_tools": True,
    "adaptive": None,
    "disabled": False,
}
"""thinking.type -> the switch; None leaves it to the template."""


def _options(tools: tuple[Tool, ...], choice: ToolChoiceBody | None) -> RequestOptions:
    if choice is None:
        return replace(PLAIN, tools=tools) if tools else PLAIN
    if choice.name is not None and choice.type != "tool":
        refuse("tool_choice.name", f"tool_choice.name needs type 'tool': {choice.type!r}")
    if choice.type == "tool" and choice.name not in {tool.name for tool in tools}:
        shown = kind_of(None) if choice.name is None else repr(choice.name[:40])
        refuse("tool_choice.name", f"tool_choice.name must be one of the tools: {shown}")
    if choice.type == "any" and not tools:
        refuse("tool_choice", "tool_choice 'any' needs tools")
    if not tools:
        return PLAIN
    return replace(
        PLAIN,
        tools=tools,
        tool_choice=_TOOL_CHOICES[choice.type],
        forced_tool=choice.name,
        parallel_tools=not choice.disable_parallel_tool_use,
    )


_TOOL_CHOICES: Mapping[str, ToolChoice] = {
    "auto": "auto",
    "any": "required",
    "tool": "required",
    "none": "none",
}

_TOOL_FIELDS = FieldTable(
    warned={"input_examples": ("examples are not shown to the model", ([],))},
    refused={
        "defer_loading": ("tools are not searched for here", (False,)),
        "allowed_callers": ("only the model itself calls tools", (["direct"], [])),
    },
)
"""Fields of a tool that `_ToolBody` does not have."""


class _ToolBody(BaseModel):
    model_config = _STRICT

    name: str
    input_schema: dict[str, Any]
    description: str = ""
    strict: bool = False
    type: str = "custom"
    cache_control: Any = None
    eager_input_streaming: bool = True  # arguments are always streamed as they are written


def _tools(value: object, limits: LimitsConfig, warnings: list[str]) -> tuple[Tool, ...]:
    """The tools that the client offers. RequestError for one that only Anthropic's own servers have."""
    if value is None:
        return ()
    if not isinstance(value, list):
        refuse("tools", f"tools must be a list: {kind_of(value)}")
    if len(value) > limits.max_tools:
        refuse("tools", f"at most {limits.max_tools} tools: {len(value)}")
    tools: dict[str, Tool] = {}
    for i, item in enumerate(value):
        where = f"tools[{i}]"
        tool = _tool(item, where, limits, warnings)
        if tool.name in tools:
            refuse(f"{where}.name", f"{where}.name: two tools have the name {tool.name!r}")
        tools[tool.name] = tool
    return tuple(tools.values())


def _tool(value: object, where: str, limits: LimitsConfig, warnings: list[str]) -> Tool:
    if not isinstance(value, dict):
        refuse(where, f"{where} must be an object: {kind_of(value)}")
    kind = value.get("type")
    if isinstance(kind, str) and kind != "custom":
        place = f"{where}.type"
        message = f"{place}: {kind[:40]!r} is not supported; a tool needs a name and an input_schema"
        raise RequestError(message, param=place, code="unsupported_tool")
    fields, told = _TOOL_FIELDS.sort(value, _ToolBody.model_fields, where)
    body = validate(_ToolBody, fields, where)
    if not _TOOL_NAME.fullmatch(body.name):
        refuse(f"{where}.name", f"{where}.name must match {_TOOL_NAME.pattern}: {body.name[:40]!r}")
    check_schema(body.input_schema, f"{where}.input_schema", limits)
    if body.input_schema.get("type", "object") != "object":
        refuse(f"{where}.input_schema.type", f"{where}.input_schema.type must be 'object'")
    check_cache_control(body.cache_control, f"{where}.cache_control")
    warnings.extend(told)
    return Tool(body.name, body.description, body.input_schema, body.strict)


def _constraint(body: MessagesRequest, limits: LimitsConfig) -> Constraint | None:
    """The form of the answer; `output_format` is the name that the API's beta had for it."""
    new = None if body.output_config is None else body.output_config.format
    if new is not None and body.output_format is not None:
        refuse("output_format", "output_format and output_config.format are the same; give one of them")
    for form, where in ((new, "output_config.format.schema"), (body.output_format, "output_format.schema")):
        if form is not None:
            return Constraint("json_schema", check_schema(form.json_schema, where, limits), where)
    return None


def _sampling(body: MessagesRequest, limits: LimitsConfig) -> SamplingParams:
    return SamplingParams(
        max_tokens=max(body.max_tokens, 1),
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        seed=body.seed,
        stop=_stop_sequences(body.stop_sequences, limits),
        ignore_eos=body.ignore_eos,
    )


def _stop_sequences(texts: list[str], limits: LimitsConfig) -> tuple[str, ...]:
    most = min(limits.max_stop_strings, MAX_STOP_STRINGS)
    if len(texts) > most:
        refuse("stop_sequences", f"at most {most} stop_sequences: {len(texts)}")
    if "" in texts:
        refuse("stop_sequences", "stop_sequences must not be empty strings")
    if sum(len(text.encode()) for text in texts) > limits.max_stop_bytes:
        refuse("stop_sequences", f"stop_sequences: at most {limits.max_stop_bytes} bytes in all")
    return tuple(texts)
