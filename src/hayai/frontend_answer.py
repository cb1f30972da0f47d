"""The form of an answer: the grammar that it must keep to, and what a router takes out of it.

Both follow from the request's options, the format that the chat template implies, and whether the prompt
ends inside the model's reasoning.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hayai.config import LimitsConfig
from hayai.engine.request import Logprob, SamplingParams, TokenEvent
from hayai.errors import RequestError
from hayai.frontend_prompt import Prompt
from hayai.frontend_request import Constraint, RequestOptions, Tool, ToolCallDelta, thinking_tags
from hayai.frontend_text import TextAssembler, TextChunk
from hayai.load import LoadedModel
from hayai.text.grammar import (
    LIMITS,
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
from hayai.text.router import CallPiece, Router
from hayai.text.tokenizer import Tokenizer
from hayai.text.tool_formats import (
    HERMES,
    CallSpec,
    call_rules,
    closed_schema,
    format_of,
    unenforced,
)
from hayai.text.tool_prompt import mistral_id

TAIL_TOKENS = 16
"""Of a prompt, in which to look for a tag at its end."""

_GRAMMARS: Mapping[str, Callable[[Any, str, LimitsConfig], Grammar]] = {
    "json": lambda _, param, limits: json_grammar(param),
    "json_schema": schema_grammar,
    "regex": regex_grammar,
    "grammar": lambda value, param, limits: lark_grammar(value, param),
    "choice": lambda value, param, limits: choice_grammar(value, param),
}


@dataclass(frozen=True)
class AnswerForm:
    """Of one request. shown: control tokens that are text for the router. mistral_ids: of calls. param: the
    field that the mask was made from."""

    mask: GrammarMask | None = None
    router: Router | None = None
    shown: frozenset[int] = frozenset()
    mistral_ids: bool = False
    param: str | None = None


NO_FORM = AnswerForm()


class AnswerForms:
    """Makes the forms of one model's answers. Safe to use from several threads."""

    def __init__(self, loaded: LoadedModel, limits: LimitsConfig = LIMITS) -> None:
        self._limits = limits
        self._tokenizer = loaded.tokenizer
        source = "" if loaded.chat_template is None else loaded.chat_template.source
        self._format = HERMES if not source else format_of(source)
        self._named = "[ARGS]" in source
        self._tags = thinking_tags(source)
        engine = loaded.engine
        self._compiler = (
            None
            if loaded.tokenizer is None
            else GrammarCompiler(loaded.tokenizer, engine.vocab_size, engine.end_ids, limits.max_grammar_cost)
        )

    def form(
        self, prompt: Prompt, ids: Sequence[int], options: RequestOptions, warnings: list[str] | None
    ) -> AnswerForm:
        """The form of an answer to `ids`. RequestError: what can't be enforced."""
        thinking = self._thinking(prompt, ids)
        mask, param = None, None
        if options.needs_grammar:
            grammar = self._grammar(options, thinking, warnings)
            mask, param = self._compile(grammar), grammar.param
        tools = {tool.name: tool.parameters for tool in options.active_tools}
        if not tools and not (thinking and options.reasoning):
            return AnswerForm(mask, param=param)
        router = Router(thinking if options.reasoning else None, self._format if tools else None, tools)
        return AnswerForm(mask, router, self._shown(), self._format.name == "mistral", param)

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
        body = None if options.constraint is None else constraint_grammar(options.constraint, self._limits)
        tools = options.active_tools
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
                check_schema(spec.schema, param, self._limits)
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


class RichAssembler(TextAssembler):
    """A TextAssembler for what most requests don't ask for, so that they don't pay for it.

    generate False: the sampled token is dropped; what comes is one chunk without text. form: what is taken
    out of the text. Stop strings are looked for before that, in all that the model wrote.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        prompt_tokens: int,
        arrived: float,
        generate: bool = True,
        form: AnswerForm = NO_FORM,
    ) -> None:
        super().__init__(tokenizer, params, prompt_tokens, arrived, form.shown, form.param)
        self._generate = generate
        self._router = form.router
        self._new_id = mistral_call_id if form.mistral_ids else call_id
        self._prompt_logprobs: tuple[Logprob | None, ...] | None = None

    def push(self, event: TokenEvent) -> TextChunk | None:
        if event.prompt_logprobs is not None:
            self._prompt_logprobs = event.prompt_logprobs
        chunk = super().push(event) if self._generate else self._score(event)
        if chunk is None:
            return None
        if self._router is not None:
            chunk = self._route(chunk, self._router)
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        return chunk if prompt_logprobs is None else chunk._replace(prompt_logprobs=prompt_logprobs)

    def _score(self, event: TokenEvent) -> TextChunk | None:
        """Only the prompt was wanted: the last event without its token."""
        if event.finish_reason not in ("stop", "length"):
            return None if event.finish_reason is None else super().push(event)
        chunk = super().push(event._replace(token_id=-1, finish_reason="stop", logprob=None))
        return None if chunk is None else chunk._replace(finish_reason="length")

    def _route(self, chunk: TextChunk, router: Router) -> TextChunk:
        parts = [router.push(chunk.text)]
        reason = chunk.finish_reason
        if reason is not None:
            parts.append(router.flush())
            if reason == "stop" and chunk.stop is None and router.num_calls:
                reason = "tool_calls"
        return chunk._replace(
            text="".join(part.text for part in parts),
            finish_reason=reason,
            reasoning="".join(part.reasoning for part in parts),
            tool_calls=tuple(self._delta(piece) for part in parts for piece in part.calls),
        )

    def _delta(self, piece: CallPiece) -> ToolCallDelta:
        if piece.name is None:
            return ToolCallDelta(piece.number, piece.arguments)
        return ToolCallDelta(piece.number, piece.arguments, self._new_id(), piece.name)


def call_id() -> str:
    """A fresh id of a tool call."""
    return "call_" + os.urandom(12).hex()


def mistral_call_id() -> str:
    """One that Mistral's templates take back."""
    return mistral_id(os.urandom(12).hex())


def constraint_grammar(constraint: Constraint, limits: LimitsConfig = LIMITS) -> Grammar:
    """The grammar of a constraint. RequestError with the field's name."""
    param = constraint.param or _PARAMS[constraint.kind]
    return _GRAMMARS[constraint.kind](constraint.value, param, limits)


_PARAMS: Mapping[str, str] = {
    "json": "response_format",
    "json_schema": "response_format",
    "regex": "regex",
    "grammar": "grammar",
    "choice": "choice",
}


def _parallel(options: RequestOptions) -> bool:
    return options.parallel_tools and options.forced_tool is None


def _in_regex(text: str) -> str:
    escaped = "".join(f"\\{char}" if char in r"\/.^$*+?()[]{}|" else char for char in text)
    return escaped.replace("\n", "\\n")
