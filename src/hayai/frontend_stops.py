"""Stop strings in a stream of text: what may be shown, and where it ends.

Each stop string has the automaton of Knuth, Morris and Pratt (1977): its state is how much of the string
the text ends with. A full state is a match, and the longest state of all is what has to be held back, so
both answers cost one step per character and do not depend on how the text was cut into pieces: the match
that is complete first wins, and of those the one that began first.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Follows one text. `push` until it reports a match; `flush` when the text ends without one."""

    def __init__(self, stops: Sequence[str]) -> None:
        # Longest first: of two that are complete at the same character it began earlier.
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._fails = [_failure_table(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found."""

    def push(self, text: str) -> str:
        """What may be shown after this piece; sets `matched` when the text ends here."""
        stops, fails, states = self._stops, self._fails, self._states
        buffer = self._held + text
        for at, char in enumerate(text, start=len(self._held)):
            for index, stop in enumerate(stops):
                state = states[index]
                if stop[state] != char:
                    if state == 0:
                        continue
                    fail = fails[index]
                    while state and stop[state] != char:
                        state = fail[state - 1]
                    if stop[state] != char:
                        states[index] = 0
                        continue
                state += 1
                if state == len(stop):
                    self.matched = stop
                    self._held = ""
                    return buffer[: at + 1 - len(stop)]
                states[index] = state
        keep = len(buffer) - max(states, default=0)
        self._held = buffer[keep:]
        return buffer[:keep]

    def flush(self) -> str:
        """What was held back; the text has ended."""
        held, self._held = self._held, ""
        return held


def _failure_table(pattern: str) -> list[int]:
    """fail[i]: length of the longest proper prefix of `pattern` that ends at pattern[i]."""
    fail = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = fail[length - 1]
        if pattern[i] == pattern[length]:
            length += 1
        fail[i] = length
    return fail
