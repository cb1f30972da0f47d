"""Splits an answer while it streams: reasoning, text, tool calls.

What comes out does not depend on how the text was cut into pieces: every decision is made at a certain
character. Nothing of a tag is shown before it is known to be text. Nothing that was given out is taken back:
* a call is given out from the moment its name is known to be a tool's and its arguments begin; the arguments
  then stream as they are written. Should they stop being JSON, the rest of the call still goes into the
  arguments, as the model wrote it (which is all that OpenAI's API promises of arguments too);
* everything that looked like a call up to there and is none (an unknown name, another form) is text, whole.
White space between calls, before the first and after the last one is dropped, and around reasoning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from hayai.text.json_scanner import JsonScanner
from hayai.text.tool_calls import SPACE, Head, after_space, json_head, named_head, whole_calls
from hayai.text.tool_formats import ToolFormat


class CallPiece(NamedTuple):
    """Of call number `number` of this answer: its name (first piece only) or more of its arguments."""

    number: int
    name: str | None
    arguments: str


class Routed(NamedTuple):
    """What came out of a piece of text."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[CallPiece, ...] = ()


class Router:
    """Routes one answer. `push` its text piece by piece, then `flush`.

    thinking: (opening tag, closing tag, whether the prompt has opened it already), or None.
    form and tools: the format of tool calls and the tools' schemas by name; None: calls are text.
    """

    def __init__(
        self,
        thinking: tuple[str, str, bool] | None,
        form: ToolFormat | None,
        tools: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._thinking = None if thinking is None else _Thinking(*thinking)
        self._calls = None if form is None else _Calls(form, tools)

    @property
    def num_calls(self) -> int:
        """Tool calls that have begun."""
        return 0 if self._calls is None else self._calls.count

    def push(self, text: str) -> Routed:
        """What this piece of the answer made certain."""
        return self._route(text, False)

    def flush(self) -> Routed:
        """The rest; the answer has ended."""
        return self._route("", True)

    def _route(self, text: str, last: bool) -> Routed:
        reasoning = ""
        if self._thinking is not None:
            reasoning, text = self._thinking.push(text, last)
        if self._calls is None:
            return Routed(text, reasoning)
        text, calls = self._calls.push(text, last)
        return Routed(text, reasoning, calls)


class _Thinking:
    """Reasoning at the start of an answer."""

    def __init__(self, opening: str, closing: str, opened: bool) -> None:
        self._opening, self._closing = opening, closing
        self._buffer = ""
        self._state: Callable[[bool], bool] = self._inside if opened else self._before
        self._started = False
        self._reasoning = ""
        self._text = ""

    def push(self, text: str, last: bool) -> tuple[str, str]:
        """(reasoning, text)"""
        self._buffer += text
        while self._state(last):
            pass
        result = self._reasoning, self._text
        self._reasoning = self._text = ""
        return result

    def _before(self, last: bool) -> bool:
        stripped = self._buffer.lstrip(SPACE)
        if stripped.startswith(self._opening):
            self._buffer = stripped[len(self._opening) :]
            self._state = self._inside
            return True
        if not last and self._opening.startswith(stripped):
            return False
        self._state = self._after
        return True

    def _inside(self, last: bool) -> bool:
        buffer = self._buffer if self._started else self._buffer.lstrip(SPACE)
        at = buffer.find(self._closing)
        if at >= 0:
            self._reasoning += buffer[:at].rstrip(SPACE)
            self._buffer = buffer[at + len(self._closing) :]
            self._state = self._between
            return True
        shown = buffer if last else buffer[: len(buffer) - partial(buffer, (self._closing,))].rstrip(SPACE)
        self._reasoning += shown
        self._started = self._started or bool(shown)
        self._buffer = buffer[len(shown) :]
        return False

    def _between(self, last: bool) -> bool:
        self._buffer = self._buffer.lstrip(SPACE)
        if self._buffer:
            self._state = self._after
        return bool(self._buffer)

    def _after(self, last: bool) -> bool:
        self._text += self._buffer
        self._buffer = ""
        return False


class _Calls:
    """Tool calls in a text. Each state looks at the buffer and says whether the next one can go on."""

    def __init__(self, form: ToolFormat, tools: Mapping[str, Mapping[str, Any]]) -> None:
        self._form = form
        self._tools = tools
        self._buffer = ""
        self._space = ""  # white space that is text only if more text follows
        self._opening = ""  # what the call at hand began with, to be given back
        self._scanner = JsonScanner()
        self._end_depth = 0  # of the scanner, where the arguments end
        self._state: Callable[[bool], bool] = self._start if form.bare else self._outside
        self._text = ""
        self._pieces: list[CallPiece] = []
        self.count = 0

    def push(self, text: str, last: bool) -> tuple[str, tuple[CallPiece, ...]]:
        """(text, pieces of calls)"""
        self._buffer += text
        while self._state(last):
            pass
        result = self._text, _joined(self._pieces)
        self._text, self._pieces = "", []
        return result

    # ------------------------------------------------------------------ text

    def _start(self, last: bool) -> bool:
        """At the very start of an answer, where JSON without a tag is a call too."""
        stripped = self._buffer.lstrip(SPACE)
        if not stripped:
            return self._go(self._outside) if last else False
        if stripped[0] in "{[":
            self._space, self._buffer = self._buffer[: len(self._buffer) - len(stripped)], stripped
            return self._go(self._head)
        return self._go(self._outside)

    def _outside(self, last: bool) -> bool:
        buffer, opens = self._buffer, self._form.opens
        found = [(at, tag) for tag in opens if (at := buffer.find(tag)) >= 0]
        if found:
            at, self._opening = min(found)
            self._give(buffer[:at])
            self._buffer = buffer[at + len(self._opening) :]
            return self._go(self._head)
        keep = 0 if last else partial(buffer, opens)
        self._give(buffer[: len(buffer) - keep])
        self._buffer = buffer[len(buffer) - keep :]
        if last and not self.count:
            self._text += self._space
            self._space = ""
        return False

    def _give(self, text: str) -> None:
        """Text is certain, but white space at its end."""
        kept = text.rstrip(SPACE)
        if kept:
            self._text += self._space + kept
            self._space = text[len(kept) :]
        else:
            self._space += text

    def _fail(self) -> bool:
        """It is no call: its beginning is text, and the rest is looked at as such."""
        opening, self._opening = self._opening, ""
        if not opening:
            opening, self._buffer = self._buffer[:1], self._buffer[1:]
        self._give(opening)
        return self._go(self._outside)

    def _go(self, state: Callable[[bool], bool]) -> bool:
        self._state = state
        return True

    # ------------------------------------------------------------------ a call begins

    def _head(self, last: bool) -> bool:
        if self._form.name in ("glm", "xml"):
            return self._go(self._whole)
        start = after_space(self._buffer, 0)
        if start < len(self._buffer) and self._buffer[start] == "[":
            start = after_space(self._buffer, start + 1)
        if start == len(self._buffer):
            return self._fail() if last else False
        if self._buffer[start] == "{":
            head = json_head(self._buffer, start)
        elif self._form.name == "mistral":
            head = named_head(self._buffer, start)
        else:
            head = False  # no other form begins so
        if head is None and not last:
            return False
        if not head:
            return self._go(self._whole) if self._form.close and self._opening else self._fail()
        if head.name not in self._tools:
            return self._fail()
        return self._begin(head, start)

    def _begin(self, head: Head, start: int) -> bool:
        scanner = self._scanner = JsonScanner()
        if not all(map(scanner.feed, self._buffer[start : head.end] if head.nested else "")):
            return self._fail()
        self._opening, self._space = "", ""
        self._pieces.append(CallPiece(self.count, head.name, "" if head.arguments else "{}"))
        self.count += 1
        self._end_depth = scanner.depth
        self._buffer = self._buffer[head.end :]
        return self._go(self._arguments if head.arguments else self._rest)

    def _arguments(self, last: bool) -> bool:
        for at, char in enumerate(self._buffer):
            if not self._scanner.feed(char):
                self._piece(at)
                return self._go(self._broken)
            if char == "}" and self._scanner.depth == self._end_depth:
                self._piece(at + 1)
                return self._go(self._rest)
        self._piece(len(self._buffer))
        return False

    def _broken(self, last: bool) -> bool:
        """Arguments that are no JSON any more, up to the end of the call."""
        close = self._form.close
        at = self._buffer.find(close) if close else -1
        if at >= 0:
            self._piece(at)
            return self._go(self._between)
        keep = 0 if last or not close else partial(self._buffer, (close,))
        self._piece(len(self._buffer) - keep)
        return False

    def _piece(self, length: int) -> None:
        if length:
            self._pieces.append(CallPiece(self.count - 1, None, self._buffer[:length]))
            self._buffer = self._buffer[length:]

    # ------------------------------------------------------------------ a call ends

    def _rest(self, last: bool) -> bool:
        """Between the end of the arguments and that of the object they are in."""
        for at, char in enumerate(self._buffer):
            if self._scanner.depth == 0:
                self._buffer = self._buffer[at:]
                return self._go(self._between)
            if not self._scanner.feed(char):  # models forget the last brace
                self._buffer = self._buffer[at:]
                return self._go(self._between)
        self._buffer = ""
        return self._go(self._between) if self._scanner.depth == 0 else False

    def _between(self, last: bool) -> bool:
        """After a call: another one, the closing tag, or text."""
        buffer, close = self._buffer.lstrip(SPACE + ",;]}"), self._form.close
        self._buffer = buffer
        if not buffer:
            return False
        if close and buffer.startswith(close):
            self._buffer = buffer[len(close) :]
            return self._go(self._outside)
        if close and close.startswith(buffer):
            self._buffer = "" if last else buffer  # cut in the middle of the closing tag
            return False
        return self._go(self._head if buffer[0] == "{" else self._outside)

    def _whole(self, last: bool) -> bool:
        """A call whose arguments have to be translated, or in another order: known at its end only."""
        close = self._form.close
        at = self._buffer.find(close)
        if at < 0 and not last:
            return False
        body, rest = (self._buffer, "") if at < 0 else (self._buffer[:at], self._buffer[at + len(close) :])
        calls = whole_calls(self._form, body, self._tools)
        if not calls or any(name not in self._tools for name, _ in calls):
            return self._fail()
        for name, arguments in calls:
            self._pieces.append(CallPiece(self.count, name, arguments))
            self.count += 1
        self._opening, self._space, self._buffer = "", "", rest
        return self._go(self._outside)


def partial(text: str, tags: Sequence[str]) -> int:
    """Length of the longest end of `text` that one of `tags` begins with."""
    for length in range(min(len(text), max(map(len, tags)) - 1), 0, -1):
        end = text[-length:]
        if any(tag.startswith(end) for tag in tags):
            return length
    return 0


def _joined(pieces: list[CallPiece]) -> tuple[CallPiece, ...]:
    """Neighbouring pieces of one call as one."""
    joined: list[CallPiece] = []
    for piece in pieces:
        if joined and piece.number == joined[-1].number:
            before = joined[-1]
            joined[-1] = before._replace(arguments=before.arguments + piece.arguments)
        else:
            joined.append(piece)
    return tuple(joined)
