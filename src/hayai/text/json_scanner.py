"""JSON as it comes, one character after the other: where a value ends, and where it stops being JSON."""

from __future__ import annotations

import re
from enum import Enum, auto

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_NUMBER_CHARS = frozenset("+-.eE0123456789")
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}
_HEX = frozenset("0123456789abcdefABCDEF")
_SPACE = frozenset(" \t\r\n")


class _Mode(Enum):
    VALUE = auto()
    FIRST_KEY = auto()  # or the end of the object
    KEY = auto()
    COLON = auto()
    FIRST_ITEM = auto()  # or the end of the array
    NEXT = auto()  # a comma or the end of what is open
    STRING = auto()
    ESCAPE = auto()
    HEX = auto()
    LITERAL = auto()
    NUMBER = auto()
    END = auto()


class JsonScanner:
    """Follows one JSON object or array (RFC 8259). `depth` is how many are open, 0 again at its end."""

    __slots__ = ("_is_key", "_mode", "_part", "_stack", "depth")

    def __init__(self) -> None:
        self.depth = 0
        self._mode = _Mode.VALUE
        self._stack: list[str] = []  # the closing brackets
        self._part = ""  # of a number; what is left of a literal; the hexadecimal digits so far
        self._is_key = False

    def feed(self, char: str) -> bool:
        """Go on with one character; False where no JSON has it here. It must not be used after that."""
        mode = self._mode
        if mode is _Mode.STRING:
            return self._string(char)
        if mode is _Mode.NUMBER:
            if char in _NUMBER_CHARS:
                self._part += char
                return True
            if not _NUMBER.fullmatch(self._part):
                return False
            mode = self._mode = _Mode.NEXT
        elif mode is _Mode.LITERAL:
            if char != self._part[0]:
                return False
            self._part = self._part[1:]
            if not self._part:
                self._mode = _Mode.NEXT
            return True
        elif mode is _Mode.ESCAPE:
            self._mode, self._part = (_Mode.HEX, "") if char == "u" else (_Mode.STRING, "")
            return char in '"\\/bfnrtu'
        elif mode is _Mode.HEX:
            self._part += char
            if len(self._part) == 4:
                self._mode = _Mode.STRING
            return char in _HEX
        return char in _SPACE or self._structure(mode, char)

    def _string(self, char: str) -> bool:
        if char == "\\":
            self._mode = _Mode.ESCAPE
        elif char == '"':
            self._mode = _Mode.COLON if self._is_key else _Mode.NEXT
        return char >= " "

    def _structure(self, mode: _Mode, char: str) -> bool:
        if mode is _Mode.NEXT:
            if char == ",":
                self._mode = _Mode.KEY if self._stack[-1] == "}" else _Mode.VALUE
                return True
            return self._close(char)
        if mode is _Mode.COLON:
            self._mode = _Mode.VALUE
            return char == ":"
        if mode in (_Mode.FIRST_KEY, _Mode.KEY):
            if char == '"':
                self._mode, self._is_key = _Mode.STRING, True
                return True
            return mode is _Mode.FIRST_KEY and self._close(char)
        if mode is _Mode.FIRST_ITEM and char == "]":
            return self._close(char)
        return mode is not _Mode.END and self._value(char)

    def _value(self, char: str) -> bool:
        if char in "{[":
            self._stack.append("}" if char == "{" else "]")
            self._mode = _Mode.FIRST_KEY if char == "{" else _Mode.FIRST_ITEM
            self.depth += 1
        elif self.depth == 0:
            return False
        elif char == '"':
            self._mode, self._is_key = _Mode.STRING, False
        elif char in _LITERALS:
            self._mode, self._part = _Mode.LITERAL, _LITERALS[char]
        else:
            self._mode, self._part = _Mode.NUMBER, char
            return char in "-0123456789"
        return True

    def _close(self, char: str) -> bool:
        if self._stack[-1] != char:
            return False
        self._stack.pop()
        self.depth -= 1
        self._mode = _Mode.NEXT if self._stack else _Mode.END
        return True
