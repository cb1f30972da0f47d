"""OpenAI's wire format, inwards: /v1/chat/completions and /v1/completions bodies -> one neutral Job.

Scalars are checked by pydantic in strict mode ("1" is not a number); messages, prompt, stop and
logit_bias by hand, so that an error names the exact place (`messages[2].content`). Ranges of sampling
values are SamplingParams' own. Extensions to the API, all optional: top_k, min_p, repetition_penalty,
ignore_eos, stop_token_ids, timings.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from hayai.engine.request import MAX_LOGPROBS, SamplingParams
from hayai.errors import RequestError
from hayai.frontend import Prompt
from hayai.server.context import ServerContext
from hayai.server.fields import REFUSED_CHAT, REFUSED_COMPLETION, check_fields, kind_of, refuse
from hayai.server.job import Job

MAX_CHOICES = 16
MAX_PROMPTS = 128
MAX_MESSAGES = 4096
DEFAULT_COMPLETION_TOKENS = 16
"""What /v1/completions gives where max_tokens is absent: the API's documented default."""

_SEED_RANGE = 1 << 64

_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_MESSAGES_SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant"]},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}]},
            "name": {"type": "string"},
        },
        "required": ["role", "content"],
    },
}
_INTEGERS = {"type": "array", "items": {"type": "integer"}}
_STRINGS = {"type": "array", "items": {"type": "string"}}
_STOP_SCHEMA = {"anyOf": [{"type": "string"}, _STRINGS]}
_PROMPT_SCHEMA = {"anyOf": [{"type": "string"}, _STRINGS, _INTEGERS, {"type": "array", "items": _INTEGERS}]}
_BIAS_SCHEMA = {"type": "object", "additionalProperties": {"type": "number"}}


class StreamOptions(BaseModel):
    """What a stream adds. include_obfuscation is accepted: padding against traffic analysis, not needed
    by any client."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationRequest(BaseModel):
    """Fields that both dialects share; see hayai.engine.request.SamplingParams for their ranges."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
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


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[Any, WithJsonSchema(_MESSAGES_SCHEMA)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: Annotated[Any, WithJsonSchema(_PROMPT_SCHEMA)]
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None


Body = TypeVar("Body", bound=GenerationRequest)


def parse_chat(raw: bytes, context: ServerContext) -> Job:
    """A chat completion body as a Job. RequestError names the field at fault."""
    body = _validate(raw, ChatRequest, REFUSED_CHAT)
    limits = {v for v in (body.max_tokens, body.max_completion_tokens) if v is not None}
    if len(limits) > 1:
        refuse("max_tokens", "max_tokens and max_completion_tokens disagree; give one of them")
    if body.top_logprobs is not None and not body.logprobs:
        refuse("top_logprobs", "top_logprobs needs logprobs: true")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = _sampling(body, limits.pop() if limits else None, logprobs)
    return _job("chat", body, (Prompt(messages=_messages(body.messages)),), params)


def parse_completion(raw: bytes, context: ServerContext) -> Job:
    """A completion body as a Job. RequestError names the field at fault."""
    body = _validate(raw, CompletionRequest, REFUSED_COMPLETION)
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    params = _sampling(body, max_tokens, body.logprobs)
    return _job("completion", body, _prompts(body.prompt), params)


def _job(
    dialect: Literal["chat", "completion"],
    body: GenerationRequest,
    prompts: tuple[Prompt, ...],
    params: SamplingParams,
) -> Job:
    if body.stream_options is not None and not body.stream:
        refuse("stream_options", "stream_options needs stream: true")
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return Job(dialect, body.model, prompts, params, body.n, body.stream, include_usage, body.timings)


def _validate(raw: bytes, model: type[Body], refused: Any) -> Body:
    try:
        parsed = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(parsed, dict):
        raise RequestError(f"the body must be a JSON object: {kind_of(parsed)}", code="invalid_json")
    kept = check_fields(parsed, model.model_fields, refused)
    try:
        return model.model_validate(kept)
    except ValidationError as error:
        raise _first_error(error) from None


def _first_error(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=False)[0]
    param = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"]).lstrip(".")
    if first["type"] == "missing":
        return RequestError(f"{param} is required", param=param, code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return RequestError(f"unknown field: {param}", param=param, code="unknown_parameter")
    message = f"{param}: {first['msg'][:1].lower()}{first['msg'][1:]}; found {kind_of(first['input'])}"
    return RequestError(message, param=param, code="invalid_value")


def _sampling(body: GenerationRequest, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
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
        logit_bias=_logit_bias(body.logit_bias),
        seed=seed,
        stop=_stop(body.stop),
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
    )


def _stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    refuse("stop", f"stop must be a string or a list of strings: {kind_of(value)}")


def _logit_bias(value: object) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        refuse("logit_bias", f"logit_bias must be an object of token ids and numbers: {kind_of(value)}")
    bias: dict[int, float] = {}
    for key, number in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            refuse("logit_bias", f"logit_bias: a key must be a token id: {key[:40]!r}")
        if isinstance(number, bool) or not isinstance(number, int | float):
            refuse("logit_bias", f"logit_bias[{key}] must be a number: {kind_of(number)}")
        bias[int(key)] = float(number)
    return bias


def _prompts(value: object) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (Prompt(text=value),)
    if not isinstance(value, list) or not value:
        refuse("prompt", f"prompt must be a string, token ids, or a list of either: {kind_of(value)}")
    if all(type(v) is int for v in value):
        return (Prompt(token_ids=_token_ids(value, "prompt")),)
    if len(value) > MAX_PROMPTS:
        refuse("prompt", f"at most {MAX_PROMPTS} prompts in one request: {len(value)}")
    prompts: list[Prompt] = []
    for i, item in enumerate(value):
        if isinstance(item, str):
            prompts.append(Prompt(text=item))
        elif isinstance(item, list) and item and all(type(v) is int for v in item):
            prompts.append(Prompt(token_ids=_token_ids(item, f"prompt[{i}]")))
        else:
            refuse("prompt", f"prompt[{i}] must be a string or a list of token ids: {kind_of(item)}")
    return tuple(prompts)


def _token_ids(values: list[int], where: str) -> tuple[int, ...]:
    bad = next((v for v in values if not 0 <= v < 1 << 31), None)
    if bad is not None:
        refuse("prompt", f"{where}: not a token id: {bad}")
    return tuple(values)


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_NULL_MESSAGE_FIELDS = ("tool_calls", "function_call", "audio", "refusal", "annotations", "tool_call_id")


def _messages(value: object) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        refuse("messages", f"messages must be a list with at least one message: {kind_of(value)}")
    if len(value) > MAX_MESSAGES:
        refuse("messages", f"at most {MAX_MESSAGES} messages: {len(value)}")
    return tuple(_message(m, f"messages[{i}]") for i, m in enumerate(value))


def _message(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        refuse(where, f"{where} must be an object: {kind_of(value)}")
    role = value.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        shown = repr(role[:40]) if isinstance(role, str) else kind_of(role)
        refuse(f"{where}.role", f"{where}.role must be one of {', '.join(_ROLES)}: {shown}")
    message = {"role": _ROLES[role], "content": _content(value.get("content"), f"{where}.content")}
    for name, field in value.items():
        if name in ("role", "content") or (name in _NULL_MESSAGE_FIELDS and field in (None, [])):
            continue
        if name != "name":
            raise RequestError(
                f"unsupported field: {where}.{name}", param=f"{where}.{name}", code="unknown_parameter"
            )
        if field is not None:
            message["name"] = _string(field, f"{where}.name")
    return message


def _content(value: object, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        refuse(where, f"{where} must be a string or a list of text parts: {kind_of(value)}")
    return "".join(_part(part, f"{where}[{i}]") for i, part in enumerate(value))


def _part(value: object, where: str) -> str:
    if not isinstance(value, dict):
        refuse(where, f"{where} must be an object: {kind_of(value)}")
    if value.get("type") != "text":
        refuse(f"{where}.type", f"{where}.type: only 'text' is supported: {str(value.get('type'))[:40]!r}")
    unknown = next((name for name in value if name not in ("type", "text")), None)
    if unknown is not None:
        refuse(f"{where}.{unknown}", f"unsupported field: {where}.{unknown}")
    return _string(value.get("text"), f"{where}.text")


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        refuse(where, f"{where} must be a string: {kind_of(value)}")
    return value
