"""A Jinja environment for templates that nobody vouches for: bounded in time, memory and reach.

Jinja's ImmutableSandboxedEnvironment keeps a template from Python's internals but not from exhausting the
process (`{% set x = x ~ x %}` forty times). So every way to build a value is watched:
* values have a weight, characters plus 8 per element counted through shared references, and none may exceed
  the render's limit: checked before strings and lists are joined or multiplied, after every filter and
  call, and for list and dict displays;
* a clock is read at every loop iteration, call, filter and operator;
* filters and string methods that multiply their input (center, ljust, wordwrap, ...) are not there, or
  replaced.

Everything raises jinja2's TemplateError or a plain exception; chat.py turns those into a RequestError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError, TemplateRuntimeError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from hayai.text.budget import MAX_INT_BITS, MAX_TEXT, Budget, LimitError, weigh

BUDGET = "render budget"  # key in the render context; no identifier, so no template can name it
# Filters that only the compiler step below can name.
_LOOP, _CONCAT, _DISPLAY = " loop", " concat", " display"
MAX_INDENT = 64


class _Counted:
    """A loop's iterable: ticks at each step; keeps the length for `loop.length`."""

    def __init__(self, values: Iterable[Any], budget: Budget) -> None:
        self._values = values
        self._budget = budget
        if not isinstance(values, Sized):
            self._values = list(budget.count(values))

    def __len__(self) -> int:
        return len(self._values)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        for value in self._values:
            self._budget.tick()
            yield value


def _budget(context: Context) -> Budget:
    budget: Budget = context.parent[BUDGET]
    return budget


def _watched(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments and result are within the budget."""
    wants = getattr(getattr(function, "jinja_pass_arg", None), "name", None)  # what jinja2 passes first

    @pass_context
    def run(context: Context, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        for value in args:
            if isinstance(value, Namespace):
                raise LimitError("a namespace can't be filtered")
        if wants == "context":
            result = function(context, *args, **kwargs)
        elif wants == "eval_context":
            result = function(context.eval_ctx, *args, **kwargs)
        elif wants == "environment":
            result = function(context.environment, *args, **kwargs)
        else:
            result = function(*args, **kwargs)
        if hasattr(result, "__next__"):
            return budget.count(result)
        return budget.check(result)

    return run


def _concat(parts: Iterable[str]) -> str:
    """Join what a template or macro put out."""
    kept: list[str] = []
    total = 0
    for part in parts:
        total += len(part)
        if total > MAX_TEXT:
            raise LimitError(f"it puts out more than {MAX_TEXT} characters")
        kept.append(part)
    return "".join(kept)


def _printable(budget: Budget, value: Any) -> Any:
    """`value`, if its text is bounded."""
    budget.fit(weigh(value, budget.max_weight))
    return value


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    return value if isinstance(value, str) else _printable(_budget(context), value)


def _bounded_join(budget: Budget, separator: str, values: Iterable[Any]) -> str:
    parts = [value if isinstance(value, str) else str(_printable(budget, value)) for value in values]
    budget.fit(sum(map(len, parts)) + len(separator) * max(len(parts) - 1, 0))
    return separator.join(parts)


@pass_context
def _filter_loop(context: Context, values: Any) -> Any:
    if isinstance(values, Undefined):
        return values  # the loop itself reports or ignores it
    return _Counted(values, _budget(context))


@pass_context
def _filter_concat(context: Context, parts: list[Any]) -> str:
    budget = _budget(context)
    return str(budget.check(_bounded_join(budget, "", parts)))


@pass_context
def _filter_display(context: Context, value: Any) -> Any:
    return _budget(context).check(value)


@pass_context
def _filter_join(context: Context, values: Any, d: str = "", attribute: str | int | None = None) -> str:
    budget = _budget(context)
    if attribute is not None:
        values = FILTERS["map"](context, values, attribute=attribute)
    return str(budget.check(_bounded_join(budget, str(d), budget.count(values))))


def _replaced(budget: Budget, text: str, old: str, new: str, count: int = -1) -> str:
    found = text.count(old)
    times = found if count < 0 else min(found, count)
    budget.fit(len(text) + times * (len(new) - len(old)))
    return text.replace(old, new, count)


@pass_context
def _filter_replace(context: Context, text: Any, old: Any, new: Any, count: int | None = None) -> str:
    budget = _budget(context)
    result = _replaced(budget, str(text), str(old), str(new), -1 if count is None else count)
    return str(budget.check(result))


@pass_context
def _filter_indent(
    context: Context, text: Any, width: int | str = 4, first: bool = False, blank: bool = False
) -> str:
    size = len(width) if isinstance(width, str) else width
    if size > MAX_INDENT:
        raise LimitError(f"it indents by {size}; at most {MAX_INDENT}")
    result = FILTERS["indent"](str(text), width, first, blank)
    return str(_budget(context).check(result))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as Hugging Face's chat templates get it: no escaping for HTML."""
    if indent is not None and (len(indent) if isinstance(indent, str) else indent) > MAX_INDENT:
        raise LimitError(f"it indents by more than {MAX_INDENT}")
    if isinstance(value, Undefined):
        raise TemplateRuntimeError("an undefined value can't be written as JSON")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    # Indentation multiplies depth and size: then the pieces are counted as they come.
    return encoder.encode(value) if indent is None else _concat(encoder.iterencode(value))


_PRECISE = re.compile(r"\d{4}")
_SIMPLE_PERCENT = re.compile(r"%(?:%|\.?\d{0,3}[sdifgexX])")


def _percent(pattern: Any, *args: Any) -> str:
    """`"%s" % x` without widths that blow up."""
    text = str(pattern)
    if _SIMPLE_PERCENT.sub("", text).count("%"):
        raise LimitError(f"format {text[:40]!r} is not supported; supported: %s, %d, %f, %g, %x")
    return text % (args[0] if len(args) == 1 else args)


def _format_filter(pattern: Any, *args: Any) -> str:
    return _percent(pattern, tuple(args))


def _round(value: Any, precision: int = 0, method: str = "common") -> float:
    if not -32 <= precision <= 32:
        raise LimitError(f"it rounds to {precision} digits")
    return float(FILTERS["round"](value, precision, method))


def _raise_exception(message: Any = "") -> None:
    raise TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 64:
        raise LimitError("a time format of more than 64 characters")
    return datetime.now().strftime(pattern)


_PLAIN_FILTERS = (
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
    "forceescape", "groupby", "int", "items", "last", "length", "list", "lower", "map", "max", "min",
    "reject", "rejectattr", "reverse", "safe", "select", "selectattr", "sort", "string", "sum", "title",
    "trim", "truncate", "unique", "upper", "urlencode", "wordcount",
)  # fmt: skip
_OWN_FILTERS: Mapping[str, Callable[..., Any]] = {
    _LOOP: _filter_loop,
    _CONCAT: _filter_concat,
    _DISPLAY: _filter_display,
    "join": _filter_join,
    "replace": _filter_replace,
    "indent": _filter_indent,
}
_CHECKED_FILTERS: Mapping[str, Callable[..., Any]] = {
    "tojson": _tojson, "format": _format_filter, "round": _round,
}  # fmt: skip
_METHODS: Mapping[type, frozenset[str]] = {
    str: frozenset({
        "capitalize", "casefold", "count", "endswith", "find", "format", "index", "isalnum", "isalpha",
        "isascii", "isdigit", "islower", "isnumeric", "isspace", "isupper", "join", "lower", "lstrip",
        "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit",
        "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper",
    }),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    int: frozenset(),
    float: frozenset(),
    bool: frozenset(),
    bytes: frozenset(),
}  # fmt: skip


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        if _PRECISE.search(format_spec):
            raise LimitError(f"format width in {format_spec[:40]!r}")
        return super().format_field(value, format_spec)


class _Format:
    """A string's `format` method; runs only where the budget is at hand, in ChatEnvironment.call."""

    def __init__(self, environment: ChatEnvironment, pattern: str) -> None:
        self._environment = environment
        self._pattern = pattern

    def __call__(self, budget: Budget, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        weight = weigh([args, kwargs], budget.max_weight)
        budget.fit(len(self._pattern) + self._pattern.count("{") * weight)
        return _Formatter(self._environment).vformat(self._pattern, args, kwargs)


class _Watch(NodeTransformer):
    """Puts the environment's hidden filters around loops, `~` and displays."""

    def _filter(self, node: nodes.Node, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._filter(node.iter, _LOOP)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._filter(nodes.List(node.nodes, lineno=node.lineno), _CONCAT)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        constant = all(isinstance(item, nodes.Const) for item in node.items)
        return node if constant else self._filter(node, _DISPLAY)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        constant = node.ctx != "load" or all(isinstance(item, nodes.Const) for item in node.items)
        return node if constant else self._filter(node, _DISPLAY)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return self._filter(node, _DISPLAY)


class _Generation(Extension):
    """`{% generation %}`: marks the assistant's part for training; here it only stands for its body."""

    tags = {"generation"}  # noqa: RUF012 - the type that jinja2 declares

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment that chat templates are compiled in."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))
    concat = staticmethod(_concat)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=_finalize,
            extensions=[LoopControlExtension, _Generation],
        )
        self.filters = {name: _watched(FILTERS[name]) for name in _PLAIN_FILTERS}
        self.filters.update({name: _watched(function) for name, function in _CHECKED_FILTERS.items()})
        self.filters.update(_OWN_FILTERS)
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        watched = _Watch().visit(source)
        watched.set_environment(self)
        return super()._generate(watched, *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind in type(obj).__mro__:
            if kind in _METHODS:
                return attr in _METHODS[kind] and super().is_safe_attribute(obj, attr, value)
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        owner = getattr(value, "__self__", None)
        if not isinstance(owner, str) or getattr(value, "__name__", "") not in ("format", "format_map"):
            return None
        return _Format(self, owner)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(__context)
        budget.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, _Format) or isinstance(owner, str):
            # Compiled templates add keywords of their own inside loops and blocks.
            kwargs = {key: value for key, value in kwargs.items() if not key.startswith("_")}
        if isinstance(__obj, _Format):
            return budget.check(__obj(budget, args, kwargs))
        if isinstance(owner, str) and __obj.__name__ == "join" and len(args) == 1:
            return budget.check(_bounded_join(budget, owner, budget.count(args[0])))
        if isinstance(owner, str) and __obj.__name__ == "replace":
            return budget.check(_replaced(budget, owner, *args, **kwargs))
        if isinstance(__obj, LoopContext) and args:
            args = (_Counted(args[0], budget), *args[1:])
        return budget.check(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator_: str, left: Any, right: Any) -> Any:
        budget = _budget(context)
        budget.tick()
        _BEFORE.get(operator_, _nothing)(budget, left, right)
        if operator_ == "%" and isinstance(left, str):
            return budget.check(_percent(left, _printable(budget, right)))
        return budget.check(self.binop_table[operator_](left, right))


def _nothing(budget: Budget, left: Any, right: Any) -> None:
    pass


def _before_add(budget: Budget, left: Any, right: Any) -> None:
    if isinstance(left, Sized) and isinstance(right, Sized):
        budget.fit(len(left) + len(right))


def _before_multiply(budget: Budget, left: Any, right: Any) -> None:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, Sized) and isinstance(times, int):
            budget.fit(weigh(value, budget.max_weight) * max(times, 0))


def _before_power(budget: Budget, left: Any, right: Any) -> None:
    integers = isinstance(left, int) and isinstance(right, int)
    if integers and left.bit_length() * abs(right) > MAX_INT_BITS:
        raise LimitError(f"it builds a number of more than {MAX_INT_BITS} bits")


_BEFORE: Mapping[str, Callable[[Budget, Any, Any], None]] = {
    "+": _before_add,
    "*": _before_multiply,
    "**": _before_power,
}
