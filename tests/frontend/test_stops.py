"""Stop strings: found however the text is cut, and nothing of them ever shown."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayai.frontend_stops import StopMatcher


def run(stops: list[str], pieces: list[str]) -> tuple[list[str], str | None]:
    """What was shown after each piece (and the end), and the stop that was found."""
    matcher = StopMatcher(stops)
    shown = []
    for piece in pieces:
        shown.append(matcher.push(piece))
        if matcher.matched is not None:
            return shown, matcher.matched
    return [*shown, matcher.flush()], None


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "found"),
    [
        (["END"], ["ab", "c"], ["ab", "c", ""], None),
        (["END"], ["abEND"], ["ab"], "END"),
        (["END"], ["abE", "N", "D", "x"], ["ab", "", ""], "END"),
        (["END"], ["abE", "N", "d"], ["ab", "", "ENd", ""], None),
        (["END"], ["EEN", "ND"], ["E", "ENND", ""], None),
        (["END"], ["EENEND"], ["EEN"], "END"),
        (["aab"], ["aa", "a", "b"], ["", "a", ""], "aab"),
        (["abab"], ["aba", "abab"], ["", "aba"], "abab"),
        (["\n\n", "###"], ["a\n", "#", "##"], ["a", "\n", ""], "###"),
        (["b", "abc"], ["abc"], ["a"], "b"),
        (["bc", "abc"], ["x", "abc"], ["x", ""], "abc"),
        (["END"], ["abEN"], ["ab", "EN"], None),
        (["é"], ["caf", "é"], ["caf", ""], "é"),
    ],
)
def test_examples(stops: list[str], pieces: list[str], shown: list[str], found: str | None) -> None:
    assert run(stops, pieces) == (shown, found)


TEXT = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4)


def first_match(stops: list[str], text: str) -> tuple[str, str | None]:
    """By definition: the match that is complete first, the longest of those."""
    for end in range(len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(TEXT, STOPS, st.lists(st.integers(0, 30), max_size=6))
def test_any_cutting_gives_the_same(text: str, stops: list[str], cuts: list[int]) -> None:
    borders = sorted({0, len(text), *(c for c in cuts if c <= len(text))})
    pieces = [text[a:b] for a, b in pairwise(borders)]
    shown, found = run(stops, pieces)
    assert ("".join(shown), found) == first_match(stops, text)


@given(TEXT, STOPS)
def test_no_more_is_held_back_than_needed(text: str, stops: list[str]) -> None:
    """At any time the text held back is the longest end of the text that begins a stop string."""
    matcher = StopMatcher(stops)
    shown = ""
    for i, char in enumerate(text):
        shown += matcher.push(char)
        if matcher.matched is not None:
            return
        so_far = text[: i + 1]
        longest = max((k for s in stops for k in range(len(s)) if so_far.endswith(s[:k])), default=0)
        assert shown == so_far[: len(so_far) - longest]
