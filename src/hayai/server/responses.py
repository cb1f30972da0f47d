"""The Responses API, inwards: bodies of /v1/responses -> one neutral Job.

Items are read by responses_items.py, the answer is written by responses_replies.py, state is kept by
responses_store.py. What is done with every other field of the API is in the table below. Extensions, all
optional: top_k, min_p, repetition_penalty, seed, stop, ignore_eos, timings.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from hayai.config import LimitsConfig
from hayai.engine.request import MAX_LOGPROBS, SamplingParams
from hayai.errors import RequestError
from hayai.frontend import Prompt
from hayai.frontend_request import RequestOptions
from hayai.server.bodies import FieldTable, read_object, validate
from hayai.server.context import ServerContext
from hayai.server.fields import PLATFORM, kind_of, refuse
from hayai.server.job import Job
from hayai.server.openai import check_effort, read_stop
from hayai.server.openai_tools import read_format, read_tool_choice, read_tools
from hayai.server.responses_items import INPUT_SCHEMA, read_items, to_messages
from hayai.server.responses_replies import Form

MAX_METADATA = 16
_STRICT = ConfigDict(strict=True, extra="forbid")
_OBJECT = {"type": "object"}
_LIST = {"type": "array"}
_STOP = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}

FIELDS = FieldTable(
    warned=PLATFORM | {"max_tool_calls": ("it limits built-in tools, and there are none", ())},
    refused={
        "background": ("a response runs while its client waits", (False,)),
        "conversation": ("conversations are not stored; use previous_response_id", ()),
        "context_management": ("the conversation is taken as it is", ([],)),
        "prompt": ("prompt templates are not stored", ()),
        "truncation": ("no input is cut: one that is too long is an error", ("disabled",)),
        "moderation": ("this server has no moderation model", ()),
        "background_options": ("a response runs while its client waits", ()),
        "access_programs": ("access belongs to the key", ([],)),
        "image": ("answers are plain text", ()),
    },
)

LOGPROBS = "message.output_text.logprobs"
INCLUDES = {LOGPROBS: "", "reasoning.encrypted_content": "reasoning is given as it is, not encrypted"}
"""What `include` may name -> what is not done about it."""


class TextOptions(BaseModel):
    """The form of the answer."""

    model_config = _STRICT

    format: Annotated[Any, WithJsonSchema(_OBJECT)] = None
    verbosity: str | None = None


class ReasoningOptions(BaseModel):
    """How much the model thinks. Reasoning is given whole; there are no summaries."""

    model_config = _STRICT

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None
    mode: str | None = None


class ResponseStreamOptions(BaseModel):
    """include_obfuscation (padding against traffic analysis) has no effect, which the answer says."""

    model_config = _STRICT

    include_obfuscation: bool = False


class ResponsesRequest(BaseModel):
    """Body of POST /v1/responses."""

    model_config = _STRICT

    model: str | None = None
    input: Annotated[Any, WithJsonSchema(INPUT_SCHEMA)] = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool = True
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0
    include: list[str] = []
    metadata: Annotated[Any, WithJsonSchema(_OBJECT)] = None
    tools: Annotated[Any, WithJsonSchema(_LIST)] = None
    tool_choice: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, _OBJECT]})] = None
    parallel_tool_calls: bool = True
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    # extensions
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: Annotated[int | None, Field(ge=0)] = None
    stop: Annotated[Any, WithJsonSchema(_STOP)] = None
    ignore_eos: bool = False
    timings: bool = False


def read_response(raw: bytes) -> tuple[ResponsesRequest, list[str]]:
    """The body, and warnings. RequestError names the field at fault."""
    given = read_object(raw)
    kept, warnings = FIELDS.sort(given, ResponsesRequest.model_fields)
    body = validate(ResponsesRequest, kept)
    for i, name in enumerate(body.include):
        if name not in INCLUDES:
            there = ", ".join(INCLUDES)
            refuse(f"include[{i}]", f"include[{i}] must be one of {there}: {name[:60]!r}")
        if INCLUDES[name]:
            warnings.append(f"include: {INCLUDES[name]}")
    if body.top_logprobs and LOGPROBS not in body.include:
        refuse("top_logprobs", f"top_logprobs needs include: ['{LOGPROBS}']")
    if body.stream_options is not None:
        if not body.stream:
            refuse("stream_options", "stream_options needs stream: true")
        if body.stream_options.include_obfuscation:
            warnings.append("stream_options.include_obfuscation: events are not padded")
    warnings += _soft_warnings(body)
    return body, warnings


def _soft_warnings(body: ResponsesRequest) -> list[str]:
    found = []
    if body.text is not None and body.text.verbosity not in (None, "medium"):
        found.append("text.verbosity: verbosity can't be set")
    reasoning = body.reasoning or ReasoningOptions()
    if reasoning.summary or reasoning.generate_summary:
        found.append("reasoning.summary: reasoning is given whole, without a summary")
    if reasoning.context or reasoning.mode:
        found.append("reasoning: context and mode can't be set")
    return found


def make_job(
    body: ResponsesRequest,
    warnings: Sequence[str],
    history: Sequence[Mapping[str, Any]],
    context: ServerContext,
) -> Job:
    """A Job that goes on from `history`, the items of earlier turns."""
    limits = context.config.limits
    items = read_items(body.input, limits.max_messages)
    tools = read_tools(body.tools, limits, nested=False)
    choice = read_tool_choice(body.tool_choice, tools, nested=False)
    messages = to_messages([*history, *items])
    if body.instructions:
        messages = ({"role": "system", "content": body.instructions}, *messages)
    text_format = None if body.text is None else body.text.format
    options = RequestOptions(
        constraint=read_format(text_format, limits, "text.format"),
        tools=tuple(t for t in tools if choice.only is None or t.name in choice.only),
        tool_choice=choice.mode,
        forced_tool=choice.forced,
        parallel_tools=body.parallel_tool_calls,
    )
    request_id = "resp_" + uuid.uuid4().hex
    form = Form(
        request=_shown_request(body),
        items=tuple(items),
        previous=body.previous_response_id,
        logprobs=LOGPROBS in body.include,
    )
    return Job(
        "responses",
        body.model,
        (Prompt(messages=messages, template_args=_template_args(body, context)),),
        _sampling(body, limits),
        stream=body.stream,
        timings=body.timings,
        options=options,
        warnings=tuple(warnings),
        request_id=request_id,
        extra={"form": form},
    )


def _template_args(body: ResponsesRequest, context: ServerContext) -> dict[str, Any]:
    effort = None if body.reasoning is None else body.reasoning.effort
    return {} if effort is None else {"reasoning_effort": check_effort(effort, context, "reasoning.effort")}


def _sampling(body: ResponsesRequest, limits: LimitsConfig) -> SamplingParams:
    try:
        return SamplingParams(
            max_tokens=body.max_output_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            seed=body.seed,
            stop=read_stop(body.stop, limits),
            ignore_eos=body.ignore_eos,
            logprobs=body.top_logprobs if LOGPROBS in body.include else None,
        )
    except RequestError as error:
        renamed = {"max_tokens": "max_output_tokens", "logprobs": "top_logprobs"}
        raise RequestError(
            str(error), param=renamed.get(error.param or "", error.param), code=error.code
        ) from None


def _shown_request(body: ResponsesRequest) -> dict[str, Any]:
    """The fields of the request that the Response object repeats."""
    tools = [
        {
            "type": "function",
            "name": tool["name"],
            "description": tool.get("description"),
            "parameters": tool.get("parameters"),
            "strict": tool.get("strict"),
        }
        for tool in body.tools or ()
    ]
    effort = None if body.reasoning is None else body.reasoning.effort
    text_format = (body.text and body.text.format) or {"type": "text"}
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": check_metadata(body.metadata),
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": effort, "summary": None},
        "store": body.store,
        "temperature": body.temperature,
        "text": {"format": text_format},
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "tools": tools,
        "top_logprobs": body.top_logprobs,
        "top_p": body.top_p,
        "truncation": "disabled",
        "background": False,
    }


def check_metadata(value: object) -> dict[str, str]:
    """At most 16 pairs of short strings, as the API has it."""
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_METADATA:
        refuse("metadata", f"metadata must be an object of at most {MAX_METADATA} strings: {kind_of(value)}")
    for key, text in value.items():
        if len(key) > 64 or not isinstance(text, str) or len(text) > 512:
            refuse("metadata", f"metadata[{key[:64]!r}]: keys have up to 64 characters, strings up to 512")
    return value
