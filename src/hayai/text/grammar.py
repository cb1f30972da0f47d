"""Grammars over the answer's bytes, and the masks of tokens that keep to them, by llguidance.

llguidance (https://github.com/guidance-ai/llguidance, MIT) walks the vocabulary's trie with an Earley parser
over derivatives of regular expressions; a mask takes tens of microseconds. Here is what surrounds it: limits,
errors that name the field, white space that ends, and one compilation for many requests.

What a model may write between the tokens of JSON is at most one space, or one line feed and an indentation:
otherwise a model that is not sure puts out blanks until its tokens are spent.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hayai.config import LimitsConfig
from hayai.errors import RequestError
from hayai.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from llguidance import LLMatcher, LLTokenizer
    from numpy.typing import NDArray

LIMITS = LimitsConfig()
MAX_LARK_CHARS = 64 << 10
MAX_CHOICES = 1024
MAX_CHOICE_CHARS = 64 << 10  # of all choices together
CACHED_GRAMMARS = 32
MAX_ITEMS_IN_ROW = 500
"""Of the Earley parser: what an ambiguous grammar may cost. At llguidance's 2000 a mask takes 50 ms before
the limit is met, here 10; no schema of MaskBench comes near."""

WHITESPACE = r" |\r?\n[ \t]{0,40}"
JSON_OPTIONS: Mapping[str, object] = {"whitespace_pattern": WHITESPACE, "lenient": False}


@dataclass(frozen=True)
class Grammar:
    """Lark in llguidance's dialect, and the request's field that it was made from.

    extra: further grammars, by name, that it refers to as `@name`.
    """

    lark: str
    param: str
    extra: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> str:
        """As llguidance reads it."""
        grammars = [{"lark_grammar": self.lark}]
        grammars += [{"name": name, "lark_grammar": lark} for name, lark in self.extra]
        return json.dumps({"grammars": grammars})


def json_rule(schema: Mapping[str, Any] | Literal[True]) -> str:
    """A checked schema as an expression of a Lark rule."""
    whole = {} if schema is True else schema
    return "%json " + json.dumps({**whole, "x-guidance": JSON_OPTIONS}, ensure_ascii=False)


def literal(text: str) -> str:
    """A text as an expression of a Lark rule."""
    return json.dumps(text, ensure_ascii=False)


def json_grammar(param: str) -> Grammar:
    """Any JSON object."""
    return Grammar("start: " + json_rule({"type": "object"}), param)


def schema_grammar(schema: object, param: str, limits: LimitsConfig = LIMITS) -> Grammar:
    """JSON that a schema allows. RequestError: no schema, or one beyond the limits."""
    return Grammar("start: " + json_rule(check_schema(schema, param, limits)), param)


def check_schema(
    schema: object, param: str, limits: LimitsConfig = LIMITS
) -> Mapping[str, Any] | Literal[True]:
    """The schema; RequestError unless it is an object or true, within the limits of size and depth."""
    if schema is not True and not isinstance(schema, Mapping):
        found = "false, which allows nothing" if schema is False else type(schema).__name__
        raise _refused(f"a JSON schema is an object; found {found}", param)
    _check_depth(schema, param, limits.max_schema_depth)
    try:
        size = len(json.dumps(schema))
    except (TypeError, ValueError) as error:
        raise _refused(f"the JSON schema is not JSON: {error}", param) from error
    if size > limits.max_schema_bytes:
        raise _refused(f"the JSON schema has {size} bytes; at most {limits.max_schema_bytes}", param)
    return schema


def _check_depth(value: object, param: str, most: int, depth: int = 0) -> None:
    if depth > most:
        raise _refused(f"the JSON schema is nested deeper than {most} levels", param)
    if isinstance(value, Mapping):
        for item in value.values():
            _check_depth(item, param, most, depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_depth(item, param, most, depth + 1)


def regex_grammar(pattern: object, param: str, limits: LimitsConfig = LIMITS) -> Grammar:
    """Text that a regular expression matches from its first to its last character (syntax of Rust's regex,
    without look-around; \\d is 0 to 9)."""
    if not isinstance(pattern, str) or not pattern:
        raise _refused("a regular expression is a string that is not empty", param)
    size = len(pattern.encode("utf-8", "replace"))
    if size > limits.max_regex_bytes:
        raise _refused(f"the regular expression has {size} bytes; at most {limits.max_regex_bytes}", param)
    # Imported where it is needed: 25 to 40 ms that a run without a grammar should not pay.
    from llguidance import regex_to_lark

    return Grammar(f"start: /{regex_to_lark(pattern)}/", param)


def lark_grammar(source: object, param: str) -> Grammar:
    """A context-free grammar as the caller wrote it: Lark with a rule `start`, or llama.cpp's GBNF, which has
    a rule `root ::= ...` and is translated."""
    if not isinstance(source, str) or not source.strip():
        raise _refused("a grammar is a string that is not empty", param)
    if len(source) > MAX_LARK_CHARS:
        raise _refused(f"the grammar has {len(source)} characters; at most {MAX_LARK_CHARS}", param)
    if _GBNF.search(source) is None:
        return Grammar(source, param)
    from llguidance.gbnf_to_lark import gbnf_to_lark  # as above

    try:
        return Grammar(gbnf_to_lark(source), param)
    except Exception as error:  # its own error, and what deep nesting makes of Python
        raise _refused(f"the GBNF grammar is not valid: {error!s:.300}", param) from error


_GBNF = re.compile(r"^[ \t]*root[ \t]*::=", re.MULTILINE)


def choice_grammar(choices: object, param: str) -> Grammar:
    """One of several texts."""
    if not isinstance(choices, Sequence) or isinstance(choices, (str, bytes)) or not choices:
        raise _refused("choices are a list of at least one string", param)
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise _refused("every choice is a string that is not empty", param)
    if len(choices) > MAX_CHOICES or sum(map(len, choices)) > MAX_CHOICE_CHARS:
        raise _refused(
            f"{len(choices)} choices of {sum(map(len, choices))} characters in all; "
            f"at most {MAX_CHOICES} of {MAX_CHOICE_CHARS}",
            param,
        )
    return Grammar("start: " + " | ".join(map(literal, choices)), param)


class GrammarMask:
    """The state of one answer in its grammar: a MaskSource of the engine.

    `fill` before every `accept`: where only one text can follow, llguidance allows the one token that the
    tokenizer would write for it, and it looks for that when a mask is asked for.
    """

    def __init__(self, matcher: LLMatcher, num_words: int, end_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._end_ids = end_ids
        self._num_ends = 0  # end tokens accepted: llguidance does not count them, so it couldn't go back
        self._num_bytes = 4 * num_words

    def fill(self, words: NDArray[np.uint32]) -> None:
        """Write the mask of the next token, bit i = token i. RuntimeError: the grammar turned out to cost
        more than it may; nothing else can follow then."""
        matcher = self._matcher
        if words.nbytes != self._num_bytes or self._num_ends:
            words[:] = 0  # rows of the output head beyond what the mask knows: padding, never allowed
        if self._num_ends:
            for token in self._end_ids:
                words[token >> 5] |= 1 << (token & 31)
            return
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, self._num_bytes)
        self._check()

    def accept(self, token: int) -> None:
        """Go on with a token. ValueError where the grammar forbids it; the state is then as before.
        RuntimeError as of `fill`."""
        if token in self._end_ids and self._matcher.is_accepting():
            self._num_ends += 1
        elif self._num_ends or self._matcher.try_consume_tokens([token]) != 1:
            self._check()
            raise ValueError(f"token {token} is not what the grammar allows here")

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RuntimeError(f"the grammar can't be followed further: {_reason(self._matcher)}")

    def rollback(self, count: int) -> None:
        """Take back the last `count` accepted tokens."""
        ends = min(count, self._num_ends)
        self._num_ends -= ends
        if count > ends and not self._matcher.rollback(count - ends):
            raise ValueError(f"{count} tokens can't be taken back: {_reason(self._matcher)}")

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        return self._matcher.is_accepting()


class GrammarCompiler:
    """Compiles grammars for one vocabulary and keeps the last ones. Safe to use from several threads.

    vocab_size: rows of the model's output head, which may be more than there are tokens. end_ids: tokens that
    may follow a complete answer. cost: the fuel for compiling one grammar, at some 50,000 a millisecond.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        end_ids: Iterable[int],
        cost: int = LIMITS.max_grammar_cost,
    ) -> None:
        self._cost = cost
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = sorted(end_ids)
        self._num_words = -(-vocab_size // 32)
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def mask(self, grammar: Grammar) -> GrammarMask:
        """A fresh state at the start of `grammar`. RequestError: what is wrong with it, and its field.

        Takes a tenth of a second at the first call (the vocabulary), then a millisecond for common schemas
        and up to a second for the largest; microseconds for one that was used lately.
        """
        source = grammar.to_json()
        with self._lock:
            compiled = self._compiled.get(source)
            if compiled is not None:
                self._compiled.move_to_end(source)
                return GrammarMask(compiled.deep_copy(), self._num_words, self._end_ids)
        fresh = self._compile(source, grammar.param)
        with self._lock:
            self._compiled[source] = fresh
            while len(self._compiled) > CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
            return GrammarMask(fresh.deep_copy(), self._num_words, self._end_ids)

    def _compile(self, source: str, param: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits  # as above

        limits = LLParserLimits(
            verbose_errors=False, max_items_in_row=MAX_ITEMS_IN_ROW, initial_lexer_fuel=self._cost
        )
        matcher = LLMatcher(self._tokens(param), source, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # some costs show in the first mask only
        if matcher.is_error():
            raise _refused(_reason(matcher), param)
        return matcher

    def _tokens(self, param: str) -> LLTokenizer:
        from llguidance import LLTokenizer  # as above

        with self._lock:
            if self._vocabulary is None:
                if not self._end_ids:
                    raise _refused("the model has no end token, so no answer could be complete", param)
                wrapper: Any = _Vocabulary(self._tokenizer, self._vocab_size, self._end_ids)
                self._vocabulary = LLTokenizer(wrapper, eos_token=self._end_ids)
            return self._vocabulary


class _Vocabulary:
    """A vocabulary in the form that llguidance takes it; padding is tokens without bytes."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = end_ids[0]
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [*tokenizer.pieces, *[b""] * (vocab_size - tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids.union(end_ids))

    def __call__(self, text: bytes | str) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._tokenizer.encode(text, special=False, bos=False)


_SCHEMA_ERROR = re.compile(
    r"^at \d+\(\d+\): failed to compile JSON schema: (.*?)(\n +\d+ \| .*)?\Z", re.DOTALL
)


_STOPS: Mapping[str, str] = {
    "NoExtensionBias": "it allows no text at all, as where a $ref or a rule leads only back to itself",
    "NoExtension": "it allows no more than the empty text",
    "MaxTokensTotal": "it allows no more tokens",
    "MaxTokensParser": "it allows no more tokens",
    "ParserTooComplex": "it is too ambiguous to be followed",
    "LexerTooComplex": "its regular expressions are too large to be followed",
    "InternalError": "the grammar library failed on it",
}
"""llguidance's names for why it stops -> what they mean."""


def _reason(matcher: LLMatcher) -> str:
    """llguidance's words, without the position of a schema in a line that we wrote ourselves."""
    text = matcher.get_error().partition("<non-verbose/>")[0].strip()
    text = _STOPS.get(text, text)
    found = _SCHEMA_ERROR.match(text)
    return (f"the JSON schema can't be enforced: {found[1].strip()}" if found else text)[:500]


def _refused(message: str, param: str) -> RequestError:
    return RequestError(f"{param}: {message}", param=param, code="invalid_grammar")
