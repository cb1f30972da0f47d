"""Ids equal llama.cpp's: default model, every pre-tokenizer, SentencePiece (see make_expected.py)."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from synthetic import PRE_NAMES, bpe_metadata, spm_metadata

from hayai.text.pretokenizers import PRE_TOKENIZERS
from hayai.text.tokenizer import Tokenizer
from hayai.weights.gguf_reader import GgufFile


def load(name: str) -> dict[str, Any]:
    data = gzip.decompress(Path(__file__).with_name(f"expected_{name}.json.gz").read_bytes())
    expected: dict[str, Any] = json.loads(data)
    return expected


@pytest.fixture(scope="module")
def smollm(default_model: Path) -> Tokenizer:
    with GgufFile(default_model) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.model
def test_default_model(smollm: Tokenizer) -> None:
    expected = load("smollm")
    assert len(expected["cases"]) > 3000
    for text, plain, *special in expected["cases"]:
        assert smollm.encode(text, special=False) == plain, ascii(text)
        assert smollm.encode(text, special=True) == (special or [plain])[0], ascii(text)


@pytest.mark.model
def test_default_model_pieces_and_ends(smollm: Tokenizer) -> None:
    expected = load("smollm")
    assert sorted(smollm.end_ids) == expected["end_ids"]
    pieces = [smollm.token_bytes(i) for i in range(0, smollm.vocab_size, 29)]
    assert pieces == [piece.encode("latin-1") for piece in expected["every_29th_piece"]]


def check(metadata: dict[str, object], texts: list[str], sums: list[tuple[int, int]]) -> None:
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer is not None
    for index, expected in sums:
        text = texts[index]
        pair = [tokenizer.encode(text, special=special, bos=False) for special in (False, True)]
        assert zlib.crc32(json.dumps(pair).encode()) == expected, ascii(text)


@pytest.mark.parametrize("name", PRE_NAMES)
def test_pre_tokenizer(name: str) -> None:
    expected = load("synthetic")
    assert len(expected["bpe"][name]) > 300
    check(bpe_metadata(name), expected["texts"], expected["bpe"][name])


def test_every_distinct_pre_tokenizer_is_compared() -> None:
    splits = {PRE_TOKENIZERS[name].splits for name in PRE_NAMES}
    assert splits == {entry.splits for entry in PRE_TOKENIZERS.values()}


@pytest.mark.parametrize("across", (False, True))
@pytest.mark.parametrize("prefix", (False, True))
def test_sentencepiece(across: bool, prefix: bool) -> None:
    expected = load("synthetic")
    sums = expected["spm"][f"{int(across)}{int(prefix)}"]
    assert len(sums) > 300
    check(spm_metadata(across=across, space_prefix=prefix), expected["texts"], sums)
