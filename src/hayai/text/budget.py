"""What one rendering of a chat template may use: time, the weight of a value, text made in all."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jinja2.exceptions import TemplateRuntimeError
from jinja2.utils import Namespace

MAX_SECONDS = 2.0  # a real template takes milliseconds
MAX_TEXT = 1 << 24  # characters; ceiling of any joined text, whatever the input
BASE_WEIGHT = 1 << 18  # of a value, plus INPUT_FACTOR times the input's
INPUT_FACTOR = 8
TOTAL_FACTOR = 64  # characters made in all, for each one that a value may have
MAX_INT_BITS = 1024


class LimitError(TemplateRuntimeError):
    """A template that wants too much."""


class Budget:
    """What one render may use."""

    def __init__(self, input_weight: int, seconds: float = MAX_SECONDS) -> None:
        self.max_weight = min(BASE_WEIGHT + INPUT_FACTOR * input_weight, MAX_TEXT)
        self._left = TOTAL_FACTOR * self.max_weight
        self._deadline = time.monotonic() + seconds
        self._seconds = seconds

    def tick(self) -> None:
        """Called at every step of the template: LimitError when the time is up."""
        if time.monotonic() > self._deadline:
            raise LimitError(f"it runs longer than {self._seconds:g} seconds")

    def fit(self, weight: int) -> None:
        """LimitError if a value of this weight must not be built."""
        if weight > self.max_weight:
            raise LimitError(f"it builds a value of more than {self.max_weight} characters")

    def check(self, value: Any) -> Any:
        """Tick, and return the fresh `value` if it is within the limits."""
        self.tick()
        if isinstance(value, str):
            self.fit(len(value))
            self._spend(len(value))
        elif isinstance(value, int):
            if value.bit_length() > MAX_INT_BITS:
                raise LimitError(f"it builds a number of more than {MAX_INT_BITS} bits")
        elif isinstance(value, (list, tuple, Mapping)) or type(value) in _VIEWS:
            self.fit(weigh(value, self.max_weight))
            self._spend(8 * len(value))
        return value

    def _spend(self, amount: int) -> None:
        self._left -= amount
        if self._left < 0:
            raise LimitError(f"it makes more than {TOTAL_FACTOR * self.max_weight} characters in all")

    def count(self, values: Iterable[Any]) -> Iterator[Any]:
        """The values one by one, each a tick, all together not too heavy."""
        total = 0
        for value in values:
            self.tick()
            total += weigh(value, self.max_weight)
            self.fit(total)
            yield value


_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))


def weigh(value: Any, limit: int) -> int:
    """Characters and 8 per element of `value`, everything as often as it is reached; stops above `limit`."""
    total = 0
    stack = [value]
    while stack and total <= limit:
        item = stack.pop()
        total += 8
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            total += 16 * len(item)
            if total <= limit:
                stack.extend(item.keys())
                stack.extend(item.values())
        elif isinstance(item, (list, tuple)) or type(item) in _VIEWS:
            total += 8 * len(item)
            if total <= limit:
                stack.extend(item)
        elif isinstance(item, Namespace):  # prints its contents, which may share without bound
            raise LimitError("a namespace can't be printed or put into a value")
    return total
