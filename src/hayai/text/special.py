"""Finding special tokens in text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping


class SpecialTokens:
    """Cuts text at special tokens the way llama.cpp does: the longest token first, over the whole text.

    Cost is linear in the text: only places where two characters begin some special token are looked at, and
    there one dictionary look-up is made per distinct length of the tokens that begin so.
    """

    def __init__(self, ids: Mapping[str, int], strip_after: frozenset[int] = frozenset()) -> None:
        """`ids` of the tokens by name; white space after those in `strip_after` is dropped."""
        self._ids = dict(ids)
        self._strip_after = strip_after
        self._lengths: dict[str, list[int]] = {}  # first two characters -> lengths, longest first
        for token in self._ids:
            self._lengths.setdefault(token[:2], []).append(len(token))
        self._lengths = {head: sorted(set(lengths), reverse=True) for head, lengths in self._lengths.items()}

    def find(self, text: str) -> list[tuple[int, int, int]]:
        """(start, end, id) of each special token, in order of place, not overlapping."""
        candidates = [
            (start, length)
            for head, lengths in self._lengths.items()
            for start in _places(text, head)
            for length in lengths
            if start + length <= len(text) and text[start : start + length] in self._ids
        ]
        # llama.cpp compares lengths in bytes and keeps the vocabulary's order among equals.
        candidates.sort(key=lambda place: self._priority(text, place))
        taken: list[tuple[int, int, int]] = []
        used = bytearray(len(text)) if candidates else b""
        for start, length in candidates:
            end = start + length
            if any(used[start:end]):
                continue
            used[start:end] = b"\1" * length  # type: ignore[index]
            taken.append((start, end, self._ids[text[start:end]]))
        return sorted(taken)

    def _priority(self, text: str, place: tuple[int, int]) -> tuple[int, int, int]:
        token = text[place[0] : place[0] + place[1]]
        return -len(token.encode()), self._ids[token], place[0]

    def split(self, text: str) -> Iterable[str | int]:
        """The text's parts in order: ids of special tokens, and the (non-empty) stretches between them."""
        found = self.find(text) if self._ids else []
        if not found:
            return [text] if text else []
        return self._parts(text, found)

    def _parts(self, text: str, found: list[tuple[int, int, int]]) -> Iterator[str | int]:
        position = 0
        previous = -1
        for start, end, token_id in [*found, (len(text), len(text), -1)]:
            stretch = text[position:start]
            if previous in self._strip_after:
                stretch = stretch.lstrip(" \t\n\v\f\r")
            if stretch:
                yield stretch
            if token_id >= 0:
                yield token_id
            position, previous = end, token_id


def _places(text: str, head: str) -> Iterator[int]:
    at = text.find(head)
    while at >= 0:
        yield at
        at = text.find(head, at + 1)
