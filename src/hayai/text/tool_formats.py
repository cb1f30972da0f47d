"""How models write tool calls: which form a chat template implies, and the grammar that forces it.

hermes   <tool_call>\\n{"name": "f", "arguments": {"a": 1}}\\n</tool_call>: Hermes, Qwen 2.5, Qwen 3
xml      <tool_call>\\n<function=f>\\n<parameter=a>\\n1\\n</parameter>\\n</function>\\n</tool_call>: Qwen 3.5
glm      <tool_call>f\\n<arg_key>a</arg_key>\\n<arg_value>1</arg_value>\\n</tool_call>: GLM 4.5 and later
mistral  [TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}] or [TOOL_CALLS]f[ARGS]{"a": 1}
llama3   {"name": "f", "parameters": {"a": 1}}, maybe after <|python_tag|>
json     {"name": "f", "arguments": {"a": 1}}, or a list of such

How several calls follow each other, and what else of these forms is understood: router.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hayai.text.grammar import json_rule, literal

MAX_CALLS = 16
"""Calls of one answer under a grammar: a model that can't stop calling is stopped."""


@dataclass(frozen=True)
class ToolFormat:
    """One way of writing calls.

    opens: texts that begin calls. close: text that ends them; empty: they end with the answer. bare: JSON at
    the very start of an answer is a call, too. marks: any of them in a template implies this format.
    """

    name: str
    opens: tuple[str, ...]
    close: str
    bare: bool
    marks: tuple[str, ...]


FORMATS: tuple[ToolFormat, ...] = (
    ToolFormat("xml", ("<tool_call>",), "</tool_call>", False, ("<function=",)),
    ToolFormat("glm", ("<tool_call>",), "</tool_call>", False, ("<arg_key>",)),
    ToolFormat("mistral", ("[TOOL_CALLS]",), "", False, ("[TOOL_CALLS]",)),
    ToolFormat("hermes", ("<tool_call>",), "</tool_call>", False, ("<tool_call>",)),
    ToolFormat("llama3", ("<|python_tag|>",), "", True, ("<|python_tag|>", '"parameters": ')),
    ToolFormat("json", ("<|tool_call|>",), "<|/tool_call|>", True, ("tools",)),
)
"""The first one that a template has a mark of is its own."""

HERMES = next(f for f in FORMATS if f.name == "hermes")


def knows_tools(source: str) -> bool:
    """Whether a chat template does anything with tools."""
    return re.search(r"\btools\b", source) is not None


def format_of(source: str) -> ToolFormat:
    """The format that a template's model writes; Hermes' where the template knows no tools, because that is
    how they are then described to the model."""
    if not knows_tools(source):
        return HERMES
    return next(f for f in FORMATS if any(mark in source for mark in f.marks))


# ---------------------------------------------------------------- grammars


@dataclass(frozen=True)
class CallSpec:
    """A tool in a grammar: its arguments are an object of this schema (`closed_schema`)."""

    name: str
    schema: Mapping[str, Any]


def closed_schema(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a tool's arguments as it is enforced: an object, and, where nothing says otherwise, with
    the named properties only. (An open object would let a model add members without end.)"""
    if not parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    open_ended = {"additionalProperties", "unevaluatedProperties", "patternProperties"}
    combined = {"anyOf", "oneOf", "allOf", "$ref"}
    schema = {"type": "object", **parameters}
    if "properties" in schema and not (open_ended | combined) & set(schema):
        schema["additionalProperties"] = False
    return schema


Write = Callable[[str], str]
"""A text of the format as an expression of a Lark rule: a control token, or its bytes."""


def call_rules(
    form: ToolFormat, specs: Sequence[CallSpec], write: Write, *, parallel: bool, named: bool
) -> str:
    """Lark rules of which `calls` is one call or several. named: Mistral's newer form."""
    rules = _RULES["named" if form.name == "mistral" and named else form.name]
    return rules(specs, write, MAX_CALLS - 1 if parallel else 0)


def _alternatives(specs: Sequence[CallSpec], call: Callable[[CallSpec], str]) -> str:
    names = [f"call_{i}" for i in range(len(specs))]
    lines = [f"{name}: {call(spec)}" for name, spec in zip(names, specs, strict=True)]
    return "\n".join(["call: " + " | ".join(names), *lines])


def _more(rule: str, count: int) -> str:
    return f" ({rule}){{0,{count}}}" if count else ""


def _object(spec: CallSpec, key: str) -> str:
    head = f'{{"name": {literal(spec.name)}, "{key}": '
    return f"{literal(head)} {json_rule(spec.schema)} {literal('}')}"


def _hermes(specs: Sequence[CallSpec], write: Write, more: int) -> str:
    def call(spec: CallSpec) -> str:
        body = _object(spec, "arguments")
        return f'{write("<tool_call>")} "\\n" {body} "\\n" {write("</tool_call>")}'

    return "calls: call" + _more('"\\n" call', more) + "\n" + _alternatives(specs, call)


def _llama3(specs: Sequence[CallSpec], write: Write, more: int) -> str:
    calls = _alternatives(specs, lambda spec: _object(spec, "parameters"))
    return "calls: call" + _more('"; " call', more) + "\n" + calls


def _json(specs: Sequence[CallSpec], write: Write, more: int) -> str:
    calls = _alternatives(specs, lambda spec: _object(spec, "arguments"))
    several = f' | "[" call{_more(literal(", ") + " call", more)} "]"' if more else ""
    return f"calls: call{several}\n{calls}"


def _mistral(specs: Sequence[CallSpec], write: Write, more: int) -> str:
    calls = _alternatives(specs, lambda spec: _object(spec, "arguments"))
    return f'calls: {write("[TOOL_CALLS]")} "[" call{_more(literal(", ") + " call", more)} "]"\n{calls}'


def _named(specs: Sequence[CallSpec], write: Write, more: int) -> str:
    def call(spec: CallSpec) -> str:
        head = f"{write('[TOOL_CALLS]')} {literal(spec.name)} {write('[ARGS]')}"
        return f"{head} {json_rule(spec.schema)}"

    return "calls: call" + _more("call", more) + "\n" + _alternatives(specs, call)


def _tagged(
    specs: Sequence[CallSpec],
    more: int,
    write: Write,
    head: Callable[[str], str],
    tags: Callable[[str], tuple[str, str]],
    tail: str,
) -> str:
    """The forms in which every argument has tags of its own and strings stand as they are."""
    rules: list[str] = []

    def call(spec: CallSpec) -> str:
        parts = [write("<tool_call>"), literal(head(spec.name))]
        required = spec.schema.get("required", ())
        for key, schema in spec.schema.get("properties", {}).items():
            before, after = tags(key)
            rule = f"arg_{len(rules)}"
            value = _tagged_value(schema, after, f"{rule}_text", rules)
            rules.append(f"{rule}: {literal(before)} {value}")
            parts.append(rule if key in required else f"{rule}?")
        return " ".join([*parts, *([literal(tail)] if tail else []), write("</tool_call>")])

    calls = _alternatives(specs, call)
    return "calls: call" + _more('"\\n" call', more) + "\n" + "\n".join([calls, *rules])


def _tagged_value(schema: Any, after: str, name: str, rules: list[str]) -> str:
    """A value and the tag after it: JSON, but strings bare, up to the first `after` (a rule `name`)."""
    if not is_text(schema):
        return f"{json_rule(schema if isinstance(schema, Mapping) else True)} {literal(after)}"
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if choices is not None:
        return "(" + " | ".join(literal(c) for c in choices if isinstance(c, str)) + f") {literal(after)}"
    escaped = re.escape(after).replace("/", "\\/").replace("\\\n", "\\n")
    rules.append(f"{name}[lazy]: /(.|\\n)*{escaped}/")
    return name


def is_text(schema: Any) -> bool:
    """Whether a property is a string, which the tagged forms write without quotes."""
    if not isinstance(schema, Mapping):
        return False
    if "type" in schema:
        return bool(schema["type"] == "string")
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return bool(values) and all(isinstance(value, str) for value in values)


def _glm(specs: Sequence[CallSpec], write: Write, more: int) -> str:
    def tags(key: str) -> tuple[str, str]:
        return f"<arg_key>{key}</arg_key>\n<arg_value>", "</arg_value>\n"

    return _tagged(specs, more, write, lambda name: f"{name}\n", tags, "")


def _xml(specs: Sequence[CallSpec], write: Write, more: int) -> str:
    def tags(key: str) -> tuple[str, str]:
        return f"<parameter={key}>\n", "\n</parameter>\n"

    return _tagged(specs, more, write, lambda name: f"\n<function={name}>\n", tags, "</function>\n")


_RULES: Mapping[str, Callable[[Sequence[CallSpec], Write, int], str]] = {
    "hermes": _hermes,
    "xml": _xml,
    "glm": _glm,
    "mistral": _mistral,
    "named": _named,
    "llama3": _llama3,
    "json": _json,
}

LIMITED_TEXT = ("minLength", "maxLength", "pattern", "format")
"""What the tagged forms can't enforce of a string."""


def unenforced(form: ToolFormat, spec: CallSpec) -> str | None:
    """The first thing in a tool's schema that this format can't enforce, by name."""
    if form.name not in ("glm", "xml"):
        return None
    if not set(spec.schema) <= _TAGGED_SCHEMA_KEYS:
        return ", ".join(sorted(set(spec.schema) - _TAGGED_SCHEMA_KEYS))
    for key, schema in spec.schema.get("properties", {}).items():
        if is_text(schema):
            for keyword in LIMITED_TEXT:
                if keyword in schema:
                    return f"{keyword} of {key}"
        elif "$ref" in str(schema):
            return f"$ref in {key}"
    return None


_TAGGED_SCHEMA_KEYS = {
    "type", "properties", "required", "additionalProperties", "title", "description", "$schema",
}  # fmt: skip
