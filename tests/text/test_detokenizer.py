"""Pushing tokens one by one gives, in sum, what decoding all bytes at once gives."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hayai.text.detokenizer import Detokenizer
from hayai.text.tokenizer import Tokenizer

RELAXED = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # a busy machine is no failure


def byte_tokenizer() -> Tokenizer:
    """A token for each byte, four longer ones that cut characters in odd places, and two special ones."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    letter = {byte: chr(byte) for byte in kept} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    longer = [
        "".join(letter[byte] for byte in text) for text in (b"ab", b"a\xf0\x9f", b"\x98\x80", b"\x9f\xe2")
    ]
    tokens = [letter[byte] for byte in range(256)] + longer + ["<|im_end|>", "<tool>"]
    tokenizer = Tokenizer.from_metadata(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * 260 + [3, 4],
            "tokenizer.ggml.merges": [],
        }
    )
    assert tokenizer is not None
    return tokenizer


TOKENIZER = byte_tokenizer()


@RELAXED
@given(st.lists(st.integers(0, 261)), st.booleans())
def test_pushes_and_flush_equal_decoding_at_once(ids: list[int], skip: bool) -> None:
    detokenizer = Detokenizer(TOKENIZER, skip_special=skip)
    pushed = [detokenizer.push(token_id) for token_id in ids]
    skipped = TOKENIZER.special_ids if skip else frozenset()
    whole = b"".join(TOKENIZER.token_bytes(i) for i in ids if i not in skipped)
    assert "".join(pushed) + detokenizer.flush() == whole.decode("utf-8", "replace")
    assert TOKENIZER.decode(ids, special=not skip) == whole.decode("utf-8", "replace")


@RELAXED
@given(st.text())
def test_valid_text_never_shows_a_replacement_before_its_time(text: str) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    pushed = [detokenizer.push(byte) for byte in text.encode()]
    assert "".join(pushed) == text
    assert detokenizer.flush() == ""


def test_characters_appear_with_their_last_byte() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert [detokenizer.push(byte) for byte in "é😀".encode()] == ["", "é", "", "", "", "😀"]
    assert detokenizer.push(0xE2) == ""
    assert detokenizer.push(ord("x")) == "\ufffdx"
    assert detokenizer.push(0xF0) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.push(ord("y")) == "y"


def test_special_tokens() -> None:
    assert [Detokenizer(TOKENIZER).push(i) for i in (260, 261)] == ["", "<tool>"]
    assert Detokenizer(TOKENIZER, skip_special=False).push(260) == "<|im_end|>"


@pytest.mark.parametrize("token_id", (-1, 262, 1 << 40))
def test_ids_outside_the_vocabulary(token_id: int) -> None:
    with pytest.raises(IndexError):
        Detokenizer(TOKENIZER).push(token_id)
    with pytest.raises(IndexError):
        TOKENIZER.decode([token_id])
