"""The incremental scanner against Python's parser."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from hayai.text.json_scanner import JsonScanner

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
DOCUMENTS = st.dictionaries(st.text(max_size=5), VALUES, max_size=4) | st.lists(VALUES, max_size=4)


def scan(text: str) -> tuple[int, bool]:
    """(characters taken, whether the value was complete with the last of them)."""
    scanner = JsonScanner()
    for at, char in enumerate(text):
        if not scanner.feed(char):
            return at, False
        if scanner.depth == 0 and char in "}]":
            return at + 1, True
    return len(text), False


@settings(max_examples=300, deadline=None)
@given(DOCUMENTS, st.sampled_from([None, 0, 2]), st.booleans())
def test_what_python_writes_is_followed_to_its_end(value: object, indent: int | None, ascii_: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_)
    assert scan(text + "x") == (len(text), True)


@settings(max_examples=500, deadline=None)
@given(DOCUMENTS, st.data())
def test_a_changed_character_is_noticed_where_python_notices_it(value: object, data: st.DataObject) -> None:
    text = json.dumps(value)
    at = data.draw(st.integers(0, len(text) - 1))
    changed = text[:at] + data.draw(st.sampled_from('{}[]",:0-.eE\\ntfu\n\x01é ')) + text[at + 1 :]
    taken, complete = scan(changed)
    try:
        json.loads(changed)
        valid = True
    except json.JSONDecodeError as error:
        valid = error.msg == "Extra data"
    opens = changed.lstrip()[:1] in ("{", "[")  # a scalar is no document here
    assert complete == (valid and opens), (changed, taken)
