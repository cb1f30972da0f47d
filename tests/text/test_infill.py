"""Fill in the middle: tokens by name or by key, and text that stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import synthetic

from hayai.text.tokenizer import Tokenizer
from hayai.text.vocab import INFILL_NAMES


def _tokenizer(kind: str, names: tuple[str, ...] = (), **keys: int) -> Tokenizer:
    make: dict[str, Any] = {
        "bpe": synthetic.bpe_metadata("smollm"),
        "spm": synthetic.spm_metadata(across=True, space_prefix=True),
    }
    metadata = make[kind]
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], *names]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], *[3] * len(names)]
    if "tokenizer.ggml.scores" in metadata:
        metadata["tokenizer.ggml.scores"] = [*metadata["tokenizer.ggml.scores"], *[0.0] * len(names)]
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("kind", ["bpe", "spm"])
@pytest.mark.parametrize("names", INFILL_NAMES)
def test_tokens_by_name(kind: str, names: tuple[str, str, str]) -> None:
    tokenizer = _tokenizer(kind, names)
    count = tokenizer.vocab_size
    ids = tokenizer.encode_infill("def f(", ") </s>\n x")
    assert ids is not None
    marks = [at for at, token in enumerate(ids) if token >= count - 3]
    assert [ids[at] for at in marks] == [count - 3, count - 2, count - 1]
    assert marks[0] == int(tokenizer.add_bos) and marks[2] == len(ids) - 1
    prefix, suffix = ids[marks[0] + 1 : marks[1]], ids[marks[1] + 1 : marks[2]]
    assert tokenizer.decode(prefix) == "def f(" and tokenizer.decode(suffix) == ") </s>\n x"
    assert tokenizer.special_ids.isdisjoint(prefix + suffix), "text is no control token"


def test_tokens_by_key_come_first() -> None:
    plain = _tokenizer("bpe")
    assert plain.encode_infill("a", "b") is None
    keys = {"fim_pre_token_id": 20, "fim_suf_token_id": 21, "fim_mid_token_id": 22}
    tokenizer = _tokenizer("bpe", INFILL_NAMES[0], **keys)
    assert (tokenizer.encode_infill("", "") or [])[-3:] == [20, 21, 22]


def test_half_a_set_is_none() -> None:
    assert _tokenizer("bpe", INFILL_NAMES[0][:2]).encode_infill("a", "b") is None
