"""Prompts that are never used twice: plain sentences made up on the spot, as token ids of an exact length.

Natural wording rather than random ids, because speculation, routing and caches behave otherwise on noise
(docs/measuring.md). The words are our own; nothing is quoted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

PEOPLE = (
    "the baker", "a young engineer", "our neighbour", "the night nurse", "an old sailor", "the teacher",
    "a quiet gardener", "the train driver", "her cousin", "the museum guide", "a travelling doctor",
    "the clockmaker", "my grandfather", "the librarian", "a tired painter", "the harbour master",
)  # fmt: skip
ACTS = (
    "repaired", "counted", "described", "borrowed", "measured", "painted", "forgot", "carried home", "sold",
    "explained", "photographed", "hid", "returned", "polished", "collected", "weighed", "sorted", "drew",
)  # fmt: skip
THINGS = (
    "the broken lantern", "three wooden boxes", "a map of the valley", "seven letters", "the garden gate",
    "a basket of pears", "the old bicycle", "a set of brass keys", "the winter coats", "two grey stones",
    "a radio without a dial", "the longest rope", "a jar of buttons", "the blue curtain", "some copper wire",
)  # fmt: skip
PLACES = (
    "behind the station", "near the frozen lake", "under the stairs", "in the market square", "by the canal",
    "at the edge of the forest", "on the third floor", "beside the lighthouse", "in a village far south",
    "across the bridge", "outside the theatre", "along the railway line", "in the back of the workshop",
)  # fmt: skip
TIMES = (
    "before sunrise", "last Tuesday", "during the storm", "in the spring of that year", "after the concert",
    "at half past nine", "every other week", "while the others slept", "on the first day of the harvest",
    "just as the shop closed", "when the river rose", "a month too late",
)  # fmt: skip
TURNS = (
    "Nobody had asked for it.", "It took longer than expected.", "The reason became clear much later.",
    "Some said it was luck.", "What happened next surprised everyone.", "The price was fair enough.",
    "There was no other way to do it.", "People still talk about it.", "It rained the whole time.",
)  # fmt: skip


def sentence(rng: random.Random) -> str:
    """One or two made-up English sentences."""
    who, act, what = rng.choice(PEOPLE), rng.choice(ACTS), rng.choice(THINGS)
    where, when, number = rng.choice(PLACES), rng.choice(TIMES), rng.randrange(2, 9000)
    form = rng.choice(
        (
            "{when}, {who} {act} {what} {where}.",
            "{who} {act} {what} {where}, {when}, for {number} coins.",
            "In the book of {number} pages, {who} {act} {what} {when}.",
            "{where}, {who} {act} {what}, and number {number} was written on the door.",
        )
    )
    text = form.format(who=who, act=act, what=what, where=where, when=when, number=number)
    text = text[0].upper() + text[1:]
    return f"{text} {rng.choice(TURNS)}" if rng.random() < 0.4 else text


class PromptSource:
    """Hands out prompts of exactly n token ids; no two of one source share their first eight tokens.

    Prefix caches work on blocks from position 0, so differing early means sharing nothing.
    `encode` turns text into ids; without one (a file that has no vocabulary) the ids are random.
    """

    DISTINCT = 8

    def __init__(
        self, seed: int, vocab_size: int, encode: Callable[[str], Sequence[int]] | None = None
    ) -> None:
        self._rng = random.Random(seed)
        self._vocab_size = vocab_size
        self._encode = encode
        self._seen: set[tuple[int, ...]] = set()

    def ids(self, n: int) -> list[int]:
        """A new prompt of n >= 1 token ids."""
        if n < 1:
            raise ValueError(f"a prompt needs at least one token: {n}")
        for _ in range(1000):
            ids = self._draw(n)
            start = tuple(ids[: self.DISTINCT])
            if start not in self._seen:
                self._seen.add(start)
                return ids
        raise ValueError(f"no new prompt of {n} tokens after 1000 draws")

    def text(self, words: int) -> str:
        """A new text of at least `words` words."""
        parts: list[str] = []
        while sum(part.count(" ") + 1 for part in parts) < words:
            parts.append(sentence(self._rng))
        return " ".join(parts)

    def _draw(self, n: int) -> list[int]:
        if self._encode is None:
            # the first ids of a vocabulary are control tokens and single bytes in every common tokenizer
            return [self._rng.randrange(self._vocab_size // 16, self._vocab_size) for _ in range(n)]
        ids: list[int] = []
        while len(ids) < n:
            ids.extend(self._encode((" " if ids else "") + self.text(n)))
        return ids[:n]
