"""OpenAI's wire format, inwards: /v1/chat/completions and /v1/completions bodies -> one neutral Job.

Scalars are checked by pydantic in strict mode ("1" is not a number); messages, prompt, tools, stop and
logit_bias by hand, so that an error names the exact place (`messages[2].content`). Ranges of sampling
values are SamplingParams' own. What is done with every other field of the API is a table in fields.py.

Extensions to the API, all optional. Sampling: top_k, min_p, repetition_penalty, ignore_eos, stop_token_ids.
Form of the answer (vLLM's names): structured_outputs, guided_json, guided_regex, guided_choice,
guided_grammar. Template: chat_template_kwargs. Cache: cache_salt. Answer: timings.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from hayai.config import LimitsConfig
from hayai.engine.request import MAX_LOGPROBS, SamplingParams
from hayai.errors import RequestError
from hayai.frontend import Prompt
from hayai.frontend_request import Constraint, RequestOptions
from hayai.server.bodies import Body, FieldTable, read_object, validate
from hayai.server.context import ServerContext
from hayai.server.fields import CHAT_REFUSED, CHAT_WARNED, PLATFORM, kind_of, refuse
from hayai.server.job import Job
from hayai.server.openai_messages import MESSAGES_SCHEMA, read_messages
from hayai.server.openai_tools import (
    FORMAT_SCHEMA,
    TOOL_CHOICE_SCHEMA,
    TOOLS_SCHEMA,
    one_constraint,
    read_format,
    read_structured,
    read_tool_choice,
    read_tools,
)

MAX_CHOICES = 128
DEFAULT_COMPLETION_TOKENS = 16
"""What /v1/completions gives where max_tokens is absent: the API's documented default."""
MAX_TEMPLATE_ARGS = 16

CHAT_FIELDS = FieldTable(warned=CHAT_WARNED, refused=CHAT_REFUSED)
COMPLETION_FIELDS = FieldTable(warned=PLATFORM)

_SEED_RANGE = 1 << 64
_INTEGERS = {"type": "array", "items": {"type": "integer"}}
_STRINGS = {"type": "array", "items": {"type": "string"}}
_STOP_SCHEMA = {"anyOf": [{"type": "string"}, _STRINGS]}
_PROMPT_SCHEMA = {"anyOf": [{"type": "string"}, _STRINGS, _INTEGERS, {"type": "array", "items": _INTEGERS}]}
_BIAS_SCHEMA = {"type": "object", "additionalProperties": {"type": "number"}}
_OBJECT = {"type": "object"}
_STRUCTURED_FIELDS = (
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)


class StreamOptions(BaseModel):
    """What a stream adds. include_obfuscation (padding against traffic analysis) has no effect, which the
    answer says."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationRequest(BaseModel):
    """Fields that both dialects share; see hayai.engine.request.SamplingParams for their ranges."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stop: Annotated[Any, WithJsonSchema(_STOP_SCHEMA)] = None
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Annotated[Any, WithJsonSchema(_BIAS_SCHEMA)] = None
    # extensions
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    stop_token_ids: Annotated[list[int], Field(max_length=64)] = []
    timings: bool = False
    cache_salt: Annotated[str, Field(max_length=256)] = ""
    structured_outputs: Annotated[Any, WithJsonSchema(_OBJECT)] = None
    guided_json: Annotated[Any, WithJsonSchema({"anyOf": [_OBJECT, {"type": "string"}]})] = None
    guided_regex: Annotated[Any, WithJsonSchema({"type": "string"})] = None
    guided_choice: Annotated[Any, WithJsonSchema(_STRINGS)] = None
    guided_grammar: Annotated[Any, WithJsonSchema({"type": "string"})] = None


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[Any, WithJsonSchema(MESSAGES_SCHEMA)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    tools: Annotated[Any, WithJsonSchema(TOOLS_SCHEMA)] = None
    tool_choice: Annotated[Any, WithJsonSchema(TOOL_CHOICE_SCHEMA)] = None
    parallel_tool_calls: bool = True
    response_format: Annotated[Any, WithJsonSchema(FORMAT_SCHEMA)] = None
    reasoning_effort: str | None = None
    # extensions
    chat_template_kwargs: Annotated[Any, WithJsonSchema(_OBJECT)] = None


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions. max_tokens 0: nothing is generated (to score the prompt, with echo)."""

    prompt: Annotated[Any, WithJsonSchema(_PROMPT_SCHEMA)]
    max_tokens: Annotated[int, Field(ge=0)] = DEFAULT_COMPLETION_TOKENS
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None


def parse_chat(raw: bytes, context: ServerContext) -> Job:
    """A chat completion body as a Job. RequestError names the field at fault."""
    limits = context.config.limits
    body, warnings = _read(raw, ChatRequest, CHAT_FIELDS)
    lengths = {v for v in (body.max_tokens, body.max_completion_tokens) if v is not None}
    if len(lengths) > 1:
        refuse("max_tokens", "max_tokens and max_completion_tokens disagree; give one of them")
    if body.top_logprobs is not None and not body.logprobs:
        refuse("top_logprobs", "top_logprobs needs logprobs: true")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = _sampling(body, limits, lengths.pop() if lengths else None, logprobs)
    tools = read_tools(body.tools, limits)
    choice = read_tool_choice(body.tool_choice, tools)
    form = {"response_format": read_format(body.response_format, limits), **_structured(body, limits)}
    options = RequestOptions(
        constraint=one_constraint(form),
        cache_salt=body.cache_salt,
        tools=tuple(t for t in tools if choice.only is None or t.name in choice.only),
        tool_choice=choice.mode,
        forced_tool=choice.forced,
        parallel_tools=body.parallel_tool_calls,
    )
    messages = read_messages(body.messages, limits.max_messages, limits.max_parts)
    prompt = Prompt(messages=messages, template_args=template_args(body, context))
    return _job("chat", body, (prompt,), params, options, limits, warnings)


def parse_completion(raw: bytes, context: ServerContext) -> Job:
    """A completion body as a Job. RequestError names the field at fault."""
    limits = context.config.limits
    body, warnings = _read(raw, CompletionRequest, COMPLETION_FIELDS)
    if body.best_of is not None and body.best_of != body.n:
        refuse("best_of", f"best_of must be n ({body.n}): every choice is returned; use n")
    if body.suffix and body.echo:
        refuse("echo", "echo and suffix can't be combined")
    params = _sampling(body, limits, max(body.max_tokens, 1), body.logprobs)
    options = RequestOptions(
        constraint=one_constraint(_structured(body, limits)),
        cache_salt=body.cache_salt,
        prompt_logprobs=body.logprobs if body.echo else None,
        generate=body.max_tokens > 0,
    )
    prompts = _prompts(body.prompt, limits, context.frontend.context_length)
    if body.suffix:
        prompts = tuple(_infill(context, prompt, body.suffix) for prompt in prompts)
    job = _job("completion", body, prompts, params, options, limits, warnings)
    return replace(job, dialect="echo", echo=True) if body.echo else job


def _infill(context: ServerContext, prompt: Prompt, suffix: str) -> Prompt:
    if prompt.text is None:
        refuse("suffix", "suffix needs a prompt of text, not of token ids")
    return context.frontend.infill(prompt.text, suffix)


def _job(
    dialect: str,
    body: GenerationRequest,
    prompts: tuple[Prompt, ...],
    params: SamplingParams,
    options: RequestOptions,
    limits: LimitsConfig,
    warnings: list[str],
) -> Job:
    if body.stream_options is not None:
        if not body.stream:
            refuse("stream_options", "stream_options needs stream: true")
        if body.stream_options.include_obfuscation:
            warnings.append("stream_options.include_obfuscation: events are not padded")
    num_choices = len(prompts) * body.n
    if num_choices > limits.max_choices:
        refuse("n", f"{num_choices} choices in one request; at most {limits.max_choices}")
    return Job(
        dialect,
        body.model,
        prompts,
        params,
        body.n,
        body.stream,
        body.stream_options is not None and body.stream_options.include_usage,
        body.timings,
        options=options,
        warnings=tuple(warnings),
    )


def _read(raw: bytes, model: type[Body], table: FieldTable) -> tuple[Body, list[str]]:
    kept, warnings = table.sort(read_object(raw), model.model_fields)
    return validate(model, kept), warnings


def _structured(body: GenerationRequest, limits: LimitsConfig) -> dict[str, Constraint]:
    return read_structured({name: getattr(body, name) for name in _STRUCTURED_FIELDS}, limits)


_OWN_VARIABLES = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"})


def template_args(body: ChatRequest, context: ServerContext) -> dict[str, Any]:
    """Variables for the chat template: `chat_template_kwargs`, and the effort where the template knows it."""
    args = check_template_args(body.chat_template_kwargs)
    if body.reasoning_effort is not None:
        args["reasoning_effort"] = check_effort(body.reasoning_effort, context, "reasoning_effort")
    return args


def check_template_args(given: object) -> dict[str, Any]:
    """`chat_template_kwargs`: a few plain values under names that are not the template's own."""
    where = "chat_template_kwargs"
    if given is None:
        return {}
    if not isinstance(given, dict) or len(given) > MAX_TEMPLATE_ARGS:
        refuse(where, f"{where} must be an object of at most {MAX_TEMPLATE_ARGS} values: {kind_of(given)}")
    for name, value in given.items():
        path = f"{where}.{name[:100]}"
        if not name.isidentifier() or name in _OWN_VARIABLES:
            refuse(path, f"{path}: not a variable that a request may set")
        if not isinstance(value, bool | int | float | str | None):
            refuse(path, f"{path} must be a string, a number, true or false: {kind_of(value)}")
    return dict(given)


EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")


def check_effort(effort: str, context: ServerContext, where: str) -> str:
    """A level that the model's template can be told; RequestError where it has no notion of it."""
    if effort not in EFFORTS:
        refuse(where, f"{where} must be one of {', '.join(EFFORTS)}: {effort[:40]!r}")
    template = context.frontend.loaded.chat_template
    if template is None or "reasoning_effort" not in template.source:
        message = f"{where} is not supported: this model's chat template has no levels of reasoning"
        raise RequestError(message, param=where, code="unsupported_parameter")
    return effort


def _sampling(
    body: GenerationRequest, limits: LimitsConfig, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    if logprobs is not None and logprobs > limits.max_logprobs:
        refuse("logprobs", f"at most {limits.max_logprobs} alternatives per token: {logprobs}")
    seed = body.seed
    if seed is not None and -(_SEED_RANGE >> 1) <= seed < 0:
        seed += _SEED_RANGE  # the API's seeds are signed 64-bit numbers, ours the same bits unsigned
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=_logit_bias(body.logit_bias, limits),
        seed=seed,
        stop=read_stop(body.stop, limits),
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
    )


def read_stop(value: object, limits: LimitsConfig) -> tuple[str, ...]:
    """`stop`: one string or several."""
    if value is None:
        return ()
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(v, str) for v in strings):
        refuse("stop", f"stop must be a string or a list of strings: {kind_of(value)}")
    if len(strings) > limits.max_stop_strings:
        refuse("stop", f"stop: at most {limits.max_stop_strings} strings: {len(strings)}")
    if sum(len(v.encode()) for v in strings) > limits.max_stop_bytes:
        refuse("stop", f"stop: at most {limits.max_stop_bytes} bytes in all")
    return tuple(strings)


def _logit_bias(value: object, limits: LimitsConfig) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        refuse("logit_bias", f"logit_bias must be an object of token ids and numbers: {kind_of(value)}")
    if len(value) > limits.max_logit_bias:
        refuse("logit_bias", f"logit_bias: at most {limits.max_logit_bias} tokens: {len(value)}")
    bias: dict[int, float] = {}
    for key, number in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            refuse("logit_bias", f"logit_bias: a key must be a token id: {key[:40]!r}")
        if isinstance(number, bool) or not isinstance(number, int | float):
            refuse("logit_bias", f"logit_bias[{key}] must be a number: {kind_of(number)}")
        bias[int(key)] = float(number)
    return bias


def _prompts(value: object, limits: LimitsConfig, context_length: int) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (Prompt(text=value),)
    if not isinstance(value, list) or not value:
        refuse("prompt", f"prompt must be a string, token ids, or a list of either: {kind_of(value)}")
    if _are_ids(value, "prompt", context_length):
        return (Prompt(token_ids=tuple(value)),)
    if len(value) > limits.max_choices:
        refuse("prompt", f"at most {limits.max_choices} prompts in one request: {len(value)}")
    prompts: list[Prompt] = []
    for i, item in enumerate(value):
        if isinstance(item, str):
            prompts.append(Prompt(text=item))
        elif isinstance(item, list) and item and _are_ids(item, f"prompt[{i}]", context_length):
            prompts.append(Prompt(token_ids=tuple(item)))
        else:
            refuse("prompt", f"prompt[{i}] must be a string or a list of token ids: {kind_of(item)}")
    return tuple(prompts)


def _are_ids(values: list[Any], where: str, context_length: int) -> bool:
    """Whether a list is token ids; RequestError for ids that can't be served. They are counted before they
    are looked at: a body has room for millions."""
    if type(values[0]) is not int:
        return False
    if len(values) >= context_length:
        raise RequestError(
            f"{where} has {len(values)} tokens, and with at least one to generate it must fit the context of "
            f"{context_length} tokens",
            param="prompt",
            code="context_length_exceeded",
        )
    if not all(type(v) is int for v in values):
        return False
    bad = next((v for v in values if not 0 <= v < 1 << 31), None)
    if bad is not None:
        refuse("prompt", f"{where}: not a token id: {bad}")
    return True
