"""The form of an answer: the grammar that it must keep to, and what a router takes out of it.

Both follow from the request's options, the format that the chat template implies, and whether the prompt
ends inside the model's reasoning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hayai.errors import RequestError
from hayai.frontend_prompt import Prompt
from hayai.frontend_request import Constraint, RequestOptions, Tool
from hayai.load import LoadedModel
from hayai.text.grammar import (
    Grammar,
    GrammarCompiler,
    GrammarMask,
    check_schema,
    choice_grammar,
    json_grammar,
    json_rule,
    lark_grammar,
    literal,
    regex_grammar,
    schema_grammar,
)
from hayai.text.router import Router
from hayai.text.tool_formats import (
    HERMES,
    CallSpec,
    call_rules,
    closed_schema,
    format_of,
    unenforced,
)

THINKING_TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
"""Around a model's reasoning; in use where the chat template has the closing one."""

TAIL_TOKENS = 16
"""Of a prompt, in which to look for a tag at its end."""

_GRAMMARS: Mapping[str, Callable[[Any, str], Grammar]] = {
    "json": lambda _, param: json_grammar(param),
    "json_schema": schema_grammar,
    "regex": regex_grammar,
    "grammar": lark_grammar,
    "choice": choice_grammar,
}


@dataclass(frozen=True)
class AnswerForm:
    """Of one request. shown: control tokens that are text for the router. mistral_ids: of calls."""

    mask: GrammarMask | None = None
    router: Router | None = None
    shown: frozenset[int] = frozenset()
    mistral_ids: bool = False


NO_FORM = AnswerForm()


class AnswerForms:
    """Makes the forms of one model's answers. Safe to use from several threads."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._tokenizer = loaded.tokenizer
        source = "" if loaded.chat_template is None else loaded.chat_template.source
        self._format = HERMES if not source else format_of(source)
        self._named = "[ARGS]" in source
        self._tags = next((tags for tags in THINKING_TAGS if tags[1] in source), None)
        engine = loaded.engine
        self._compiler = (
            None
            if loaded.tokenizer is None
            else GrammarCompiler(loaded.tokenizer, engine.vocab_size, engine.end_ids)
        )

    def is_plain(self, prompt: Prompt, options: RequestOptions) -> bool:
        """Whether the answer is just its text."""
        return (
            options.constraint is None
            and not _active_tools(options)
            and not (self._tags and options.reasoning and prompt.is_chat)
        )

    def needs_grammar(self, options: RequestOptions) -> bool:
        """Whether `form` has to compile something."""
        tools = _active_tools(options)
        return options.constraint is not None or (
            bool(tools)
            and (
                options.tool_choice == "required"
                or options.forced_tool is not None
                or any(tool.strict for tool in tools)
            )
        )

    def form(
        self, prompt: Prompt, ids: Sequence[int], options: RequestOptions, warnings: list[str] | None
    ) -> AnswerForm:
        """The form of an answer to `ids`. RequestError: what can't be enforced."""
        thinking = self._thinking(prompt, ids)
        mask = None
        if self.needs_grammar(options):
            mask = self._compile(self._grammar(options, thinking, warnings))
        tools = {tool.name: tool.parameters for tool in _active_tools(options)}
        if not tools and not (thinking and options.reasoning):
            return AnswerForm(mask)
        router = Router(thinking if options.reasoning else None, self._format if tools else None, tools)
        return AnswerForm(mask, router, self._shown(), self._format.name == "mistral")

    def _thinking(self, prompt: Prompt, ids: Sequence[int]) -> tuple[str, str, bool] | None:
        """(opening, closing, whether the prompt has opened it); None where there will be no reasoning."""
        if self._tags is None or self._tokenizer is None or not prompt.is_chat:
            return None
        tail = [token for token in ids[-TAIL_TOKENS:] if token < self._tokenizer.vocab_size]
        end = self._tokenizer.decode(tail, special=True).rstrip()
        opening, closing = self._tags
        return None if end.endswith(closing) else (opening, closing, end.endswith(opening))

    def _shown(self) -> frozenset[int]:
        assert self._tokenizer is not None
        names = {*self._format.opens, self._format.close, "[ARGS]", "[CALL_ID]", *(self._tags or ())}
        control = self._tokenizer.control_ids
        return frozenset(control[name] for name in names if name in control)

    # ------------------------------------------------------------------ grammars

    def _compile(self, grammar: Grammar) -> GrammarMask:
        if self._compiler is None:
            raise RequestError(
                "the model has no vocabulary, so its answers can't be kept to a form",
                param=grammar.param,
                code="no_vocabulary",
            )
        return self._compiler.mask(grammar)

    def _grammar(
        self, options: RequestOptions, thinking: tuple[str, str, bool] | None, warnings: list[str] | None
    ) -> Grammar:
        body = None if options.constraint is None else constraint_grammar(options.constraint)
        tools = _active_tools(options)
        if not tools:
            assert body is not None
            rules, param = "answer: @body", body.param
        else:
            forced = options.tool_choice == "required" or options.forced_tool is not None
            specs = self._specs(tools, warnings)
            if forced or body is not None:
                calls = call_rules(
                    self._format, specs, self._write, parallel=_parallel(options), named=self._named
                )
                rules = f"answer: calls{'' if forced else ' | @body'}\n{calls}"
                body = None if forced else body
            else:
                rules = self._free_text(specs, options.parallel_tools)
            param = "tools" if body is None else body.param
        if body is not None and thinking is None and not tools:
            return body
        lark = f"{self._start(thinking)}\n{rules}\n"
        return Grammar(lark, param, () if body is None else (("body", body.lark),))

    def _start(self, thinking: tuple[str, str, bool] | None) -> str:
        if thinking is None:
            return "start: answer"
        opening, closing, opened = thinking
        if closing in self._control():
            inside = f"thinking: ANY {self._write(closing)}\nANY: /(.|\\n)*/"
        else:
            inside = f"thinking[lazy]: /(.|\\n)*{_in_regex(closing)}/"
        before = "thinking" if opened else f"({self._write(opening)} thinking)?"
        return f"start: {before} GAP? answer\nGAP: /[ \\n]{{1,4}}/\n{inside}"

    def _free_text(self, specs: Sequence[CallSpec], parallel: bool) -> str:
        """Text with calls in it, of which only the calls are bound."""
        form = self._format
        if form.bare:
            calls = call_rules(form, specs, self._write, parallel=parallel, named=False)
            opening = " ".join(f"({self._write(tag)})?" for tag in form.opens if tag in self._control())
            return f"answer: {opening} calls | OTHER\nOTHER: /[^{{\\[ \\t\\r\\n](.|\\n)*/\n{calls}"
        (tag,) = form.opens
        calls = call_rules(
            form,
            specs,
            lambda text: "" if text == tag else self._write(text),
            parallel=False,
            named=self._named,
        )
        if tag in self._control():
            trigger = f"trigger: TEXT {self._write(tag)}"
        else:
            trigger = f"trigger[lazy]: /(.|\\n)*{_in_regex(tag)}/"
        answer = "(trigger calls)* TEXT" if parallel else "trigger calls | TEXT"
        return f"answer: {answer}\nTEXT: /(.|\\n)*/\n{trigger}\n{calls}"

    def _specs(self, tools: Sequence[Tool], warnings: list[str] | None) -> list[CallSpec]:
        return [self._spec(tool, warnings) for tool in tools]

    def _spec(self, tool: Tool, warnings: list[str] | None) -> CallSpec:
        """A tool's schema as far as it can be enforced. RequestError where it can't be and must."""
        param = f"tools.{tool.name}.parameters"
        spec = CallSpec(tool.name, closed_schema(tool.parameters))
        reason = unenforced(self._format, spec)
        if reason is None:
            try:
                check_schema(spec.schema, param)
                self._compile(Grammar(f"start: {json_rule(spec.schema)}", param))
                return spec
            except RequestError as error:
                reason = str(error)
        else:
            reason = f"{param}: the model's form of tool calls can't enforce {reason}"
        if tool.strict:
            raise RequestError(reason, param="tools", code="invalid_grammar")
        if warnings is not None:
            warnings.append(f"arguments of {tool.name} are not kept to its schema: {reason}")
        return CallSpec(tool.name, {"type": "object"})

    def _control(self) -> Mapping[str, int]:
        return {} if self._tokenizer is None else self._tokenizer.control_ids

    def _write(self, text: str) -> str:
        """A text of the format in a Lark rule: by its id where it is a control token."""
        token = self._control().get(text)
        return literal(text) if token is None else f"<[{token}]>"


def constraint_grammar(constraint: Constraint) -> Grammar:
    """The grammar of a constraint. RequestError with the field's name."""
    return _GRAMMARS[constraint.kind](constraint.value, constraint.param or _PARAMS[constraint.kind])


_PARAMS: Mapping[str, str] = {
    "json": "response_format",
    "json_schema": "response_format",
    "regex": "regex",
    "grammar": "grammar",
    "choice": "choice",
}


def _active_tools(options: RequestOptions) -> tuple[Tool, ...]:
    """The tools that may be called in this answer."""
    if options.forced_tool is not None:
        return tuple(tool for tool in options.tools if tool.name == options.forced_tool)
    return () if options.tool_choice == "none" else options.tools


def _parallel(options: RequestOptions) -> bool:
    return options.parallel_tools and options.forced_tool is None


def _in_regex(text: str) -> str:
    escaped = "".join(f"\\{char}" if char in r"\/.^$*+?()[]{}|" else char for char in text)
    return escaped.replace("\n", "\\n")
