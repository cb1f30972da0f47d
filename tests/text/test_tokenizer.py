"""Special tokens, options, text that is not Unicode, and vocabularies that are damaged or hostile."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hayai.errors import ModelError
from hayai.text.special import SpecialTokens
from hayai.text.tokenizer import Tokenizer

RELAXED = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # a busy machine is no failure

KEY = "tokenizer.ggml."
LETTERS = [chr(byte) for byte in range(0x21, 0x7F)] + ["Ġ", "Ċ"]


def bpe(**changes: Any) -> dict[str, Any]:
    tokens = [*LETTERS, "<|im_start|>", "<|im_end|>", "<think>", "he", "ll", "hell", "Ġh"]
    types = [1] * len(LETTERS) + [3, 3, 4, 1, 1, 1, 1]
    metadata: dict[str, Any] = {
        "model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": types,
        "merges": ["h e", "l l", "he ll", "Ġ h"],
        "bos_token_id": len(LETTERS), "eos_token_id": len(LETTERS) + 1,
    }  # fmt: skip
    metadata.update(changes)
    return {KEY + key: value for key, value in metadata.items() if value is not None}


def spm(**changes: Any) -> dict[str, Any]:
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "s",
        ">",
        "</",
        "▁a",
        "s>",
    ]
    metadata: dict[str, Any] = {
        "model": "llama", "tokens": tokens, "token_type": [2, 3, 3] + [6] * 256 + [1] * 7,
        "scores": [0.0] * 259 + [-1.0, -2.0, -3.0, -4.0, -5.0, -1.5, -1.5],
    }  # fmt: skip
    metadata.update(changes)
    return {KEY + key: value for key, value in metadata.items() if value is not None}


def build(metadata: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer is not None
    return tokenizer


def names(tokenizer: Tokenizer, text: str, **options: Any) -> list[str]:
    return [tokenizer.token(i) for i in tokenizer.encode(text, **{"special": False, **options})]


def test_control_tokens_only_where_asked_and_user_defined_always() -> None:
    tokenizer = build(bpe())
    text = "hell<|im_end|><think>he"
    assert names(tokenizer, text, special=True) == ["hell", "<|im_end|>", "<think>", "he"]
    plain = names(tokenizer, text)
    assert plain == ["hell", *"<|im_end|>", "<think>", "he"]
    assert tokenizer.decode(tokenizer.encode(text, special=True)) == "hell<think>he"
    assert tokenizer.decode(tokenizer.encode(text, special=True), special=True) == text
    assert tokenizer.special_ids == {tokenizer.vocabulary.ids["<|im_start|>"], tokenizer.eos_id}
    assert tokenizer.end_ids == {tokenizer.eos_id}


def test_beginning_token() -> None:
    assert names(build(bpe()), "he") == ["he"]
    assert names(build(bpe(add_bos_token=True)), "he") == ["<|im_start|>", "he"]
    assert names(build(bpe(add_bos_token=True)), "he", bos=False) == ["he"]
    assert names(build(bpe(pre="llama-bpe")), "he") == ["<|im_start|>", "he"]
    assert names(build(bpe(pre="llama-bpe", add_bos_token=False)), "he") == ["he"]
    assert names(build(spm()), "a") == ["<s>", "▁a"]
    with pytest.raises(ModelError, match="bos_token_id"):
        build(bpe(add_bos_token=True, bos_token_id=None))
    with pytest.raises(ModelError, match="bos_token_id"):
        build(bpe(bos_token_id=None)).encode("he", special=False, bos=True)


def test_space_prefix() -> None:
    assert names(build(bpe(add_space_prefix=True)), "h<think>h") == ["Ġh", "<think>", "Ġh"]
    assert names(build(spm(add_space_prefix=False)), "a a", bos=False) == ["a", "▁a"]
    assert build(spm()).encode("", special=False, bos=False) == []


def test_a_control_token_is_not_made_of_text() -> None:
    assert names(build(spm()), "a</s>", bos=False) == ["▁a", "</", "s>"]
    tokens = ["EOS", *LETTERS]
    changes = {"tokens": tokens, "token_type": [3] + [1] * len(LETTERS), "merges": [], "eos_token_id": 0}
    tokenizer = build(bpe(pre="glm4", bos_token_id=None, **changes))
    assert names(tokenizer, "EOS") == ["E", "O", "S"]
    assert names(tokenizer, "EOS", special=True) == ["EOS"]


def test_ordinary_markup_is_not_an_end_token() -> None:
    changes = {
        "tokens": [*LETTERS, "</", "s>", "</s>"],
        "token_type": [1] * (len(LETTERS) + 3),
        "bos_token_id": None,
    }
    tokenizer = build(bpe(merges=["< /", "s >", "</ s>"], eos_token_id=3, **changes))
    assert tokenizer.end_ids == {3}
    assert build(bpe(merges=[], eos_token_id=3, **changes)).end_ids == {3, len(LETTERS) + 2}


def test_bytes_that_no_token_has_vanish_and_merge_nothing() -> None:
    assert names(build(bpe()), "h\x00e l\x00l") == ["h", "e", "Ġ", "l", "l"]


@pytest.mark.parametrize(
    ("text", "same_as"),
    (
        (b"he\xffhe".decode("utf-8", "surrogateescape"), "he\ufffdhe"),
        ("\ud83d", "\ufffd"),
        ("a\ud800b\udfff", "a\ufffdb\ufffd"),
    ),
)
def test_lone_surrogates_are_replacement_characters(text: str, same_as: str) -> None:
    for tokenizer in (build(bpe()), build(spm())):
        assert tokenizer.encode(text, special=False) == tokenizer.encode(same_as, special=False)
        assert tokenizer.encode(text, special=True) == tokenizer.encode(same_as, special=True)


@RELAXED
@given(st.text(st.characters(codec=None)))
def test_any_string_is_encoded_without_control_tokens(text: str) -> None:
    for tokenizer in (BPE, SPM):
        ids = tokenizer.encode(text + "<|im_end|></s>" + text, special=False, bos=False)
        assert tokenizer.special_ids.isdisjoint(ids)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


BPE, SPM = build(bpe()), build(spm())


@RELAXED
@given(
    st.text("ab<|>s", max_size=30), st.sets(st.text("ab<|>s", min_size=1, max_size=5), min_size=1, max_size=6)
)
def test_special_tokens_are_cut_longest_first(text: str, tokens: set[str]) -> None:
    """Against the rule as llama.cpp carries it out: token by token, longest first, within what is left."""
    ids = {token: i for i, token in enumerate(sorted(tokens, key=lambda token: (-len(token), token)))}
    parts: list[str | int] = [text] if text else []
    for token, token_id in ids.items():
        cut: list[str | int] = []
        for part in parts:
            if isinstance(part, int):
                cut.append(part)
                continue
            for n, stretch in enumerate(part.split(token)):
                cut += ([token_id] if n else []) + ([stretch] if stretch else [])
        parts = cut
    assert list(SpecialTokens(ids).split(text)) == parts


def test_no_vocabulary() -> None:
    assert Tokenizer.from_metadata({}) is None
    assert Tokenizer.from_metadata({KEY + "model": "no_vocab"}) is None
    assert Tokenizer.from_metadata(bpe(tokens=None)) is None
    assert Tokenizer.from_metadata(bpe(tokens=[])) is None


@pytest.mark.parametrize(
    ("metadata", "message"),
    (
        (bpe(model="bert"), "'bert'.*supported: gpt2, llama"),
        (bpe(model=7), "must be a string"),
        (bpe(pre="nonsense"), "'nonsense'.*supported: .*smollm"),
        (bpe(pre=None), "does not name its pre-tokenizer.*supported"),
        (bpe(pre=["smollm"]), "must be a string"),
        (bpe(tokens="abc"), "must be an array"),
        (bpe(tokens=[1, 2]), r"tokens\[0\] must be a string"),
        (bpe(tokens=[*LETTERS, None]), r"tokens\[\d+\] must be a string"),
        (bpe(tokens=[*LETTERS, b"\xff"]), "is not UTF-8"),
        (bpe(tokens=[*LETTERS, "\udcff"]), "is not UTF-8"),
        (bpe(tokens=["a", "b", "a"]), "'a' twice: as 0 and 2"),
        (bpe(token_type=[1]), "1 entries for"),
        (bpe(token_type=["x"] * 200), "integers only"),
        (bpe(token_type=3), "must be an array"),
        (bpe(merges=None), "needs tokenizer.ggml.merges"),
        (bpe(merges=["h"]), "not two tokens"),
        (bpe(merges=["h "]), "not two tokens"),
        (bpe(merges=["h e l"]), "do not fit the vocabulary"),
        (bpe(merges=["h zzz"]), "do not fit the vocabulary"),
        (bpe(merges=["h l"]), "do not fit the vocabulary"),
        (bpe(merges=[7]), r"merges\[0\] must be a string"),
        (bpe(merges=7), "must be an array"),
        (bpe(eos_token_id=-1), "outside the vocabulary"),
        (bpe(eos_token_id=1 << 70), "outside the vocabulary"),
        (bpe(eos_token_id="2"), "must be an integer"),
        (bpe(eos_token_id=True), "must be an integer"),
        (bpe(add_bos_token="yes"), "must be a boolean"),
        (spm(scores=None), "needs tokenizer.ggml.scores"),
        (spm(scores=[1.0]), "1 entries for"),
        (spm(scores=["x"] * 300), "numbers only"),
        (spm(scores=[float("nan")] * 300), "numbers only"),
        (spm(unknown_token_id=999), "outside the vocabulary"),
    ),
)
def test_damaged_vocabulary(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Tokenizer.from_metadata(metadata)


SCALARS = st.sampled_from(
    (
        None,
        True,
        -1,
        0,
        3,
        300,
        1 << 40,
        -0.5,
        float("inf"),
        "",
        "he",
        "</s>",
        "\udcff",
        "smollm",
        b"h e",
        b"\xff",
    )
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=8), st.just({"a": 1}))


@RELAXED
@given(st.sampled_from((bpe(), spm())), st.data())
def test_any_metadata_gives_a_tokenizer_or_a_model_error(
    metadata: dict[str, Any], data: st.DataObject
) -> None:
    for key in data.draw(st.lists(st.sampled_from(sorted(metadata)), max_size=3)):
        metadata = {**metadata, key: data.draw(VALUES)}
    try:
        tokenizer = Tokenizer.from_metadata(metadata)
    except ModelError:
        return
    if tokenizer is not None:
        tokenizer.decode(tokenizer.encode("hello </s><|im_end|>", special=True, bos=False))


@pytest.mark.parametrize(
    "text", ("a", " ", "\n", "<", "<|", "<|im_end|>", "1", "é", "hell ", " \n", "'", "▁", "s>")
)
def test_cost_is_linear(text: str) -> None:
    """Ten times the text takes about ten times the time: quadratic would be a hundred times."""
    for tokenizer in (BPE, SPM):
        seconds = []
        for count in (20_000, 200_000):
            started = time.process_time()
            tokenizer.encode(text * (count // len(text)), special=True, bos=False)
            seconds.append(time.process_time() - started)
        assert seconds[1] < 40 * seconds[0] + 0.5
