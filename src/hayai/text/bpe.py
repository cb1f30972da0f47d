"""Byte-level BPE (GPT-2 and its descendants), on the `tokenizers` library."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

from hayai.errors import ModelError
from hayai.text.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from hayai.text.vocab import CONTROL, NORMAL, PREFIX, UNKNOWN, USER_DEFINED, Vocabulary, strings, text

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library


def _byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: itself where printable Latin-1, else the next code point from 256 on."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(kept)]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + n) for n, byte in enumerate(others)}


LETTER_OF_BYTE = _byte_letters()
# str.translate table from letters to Latin-1, whose encoding gives the bytes back.
_LATIN1_OF_LETTER = {ord(letter): chr(byte) for byte, letter in LETTER_OF_BYTE.items()}


class ByteBpe:
    """Encodes plain text (no special tokens in it) with a byte-level BPE vocabulary."""

    add_space_prefix = False

    def __init__(
        self, metadata: Mapping[str, object], vocabulary: Vocabulary, ids: Mapping[str, int]
    ) -> None:
        pre = find_pre_tokenizer(metadata)
        self.add_bos = pre.add_bos
        self._library = _build(vocabulary, dict(ids), read_merges(metadata, ids), pre)

    def encode(self, stretch: str) -> list[int]:
        """Ids of a stretch of valid Unicode text."""
        ids: list[int] = self._library.encode(stretch, add_special_tokens=False).ids
        return ids

    @staticmethod
    def pieces(vocabulary: Vocabulary) -> list[bytes]:
        """The bytes that each token stands for: a special token's are its name, a placeholder has none."""
        normal = [
            token if kind == NORMAL else ""
            for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        ]
        try:  # all at once: a letter is a byte, so that the lengths say where to cut
            joined = "".join(normal).translate(_LATIN1_OF_LETTER).encode("latin-1")
        except UnicodeEncodeError:  # some letter stands for no byte
            pieces = list(map(_piece, normal))
        else:
            ends = list(accumulate(map(len, normal)))
            pieces = [joined[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        for token_id in vocabulary.ids_of_type(CONTROL, USER_DEFINED, UNKNOWN):
            pieces[token_id] = vocabulary.tokens[token_id].encode()
        return pieces


def _piece(token: str) -> bytes:
    try:
        return token.translate(_LATIN1_OF_LETTER).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()


def find_pre_tokenizer(metadata: Mapping[str, object]) -> PreTokenizer:
    """The pre-tokenizer that the file names; ModelError when it names none or one that is not known."""
    name = text(metadata, "pre")
    supported = ", ".join(sorted(PRE_TOKENIZERS))
    if name is None:
        raise ModelError(f"the file does not name its pre-tokenizer ({PREFIX}pre); supported: {supported}")
    found = PRE_TOKENIZERS.get(name)
    if found is None:
        raise ModelError(f"unknown pre-tokenizer {name[:60]!r} in {PREFIX}pre; supported: {supported}")
    return found


def read_merges(metadata: Mapping[str, object], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges in order of rank; of a pair that is listed twice the first counts. Their strings are those
    of `ids` where they are tokens: no second copy of the vocabulary comes into being."""
    merges = strings(metadata, "merges")
    if merges is None:
        raise ModelError(f"a BPE vocabulary needs {PREFIX}merges; the file has none")
    same = {token: token for token in ids}
    pairs = []
    for i, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if not left or not right:  # a part that is a space itself, or damage
            left, right = _pair(i, merge)
        pairs.append((same.get(left, left), same.get(right, right)))
    if len(set(merges)) != len(merges):
        pairs = list(dict.fromkeys(pairs))
    return pairs


def _pair(index: int, merge: str) -> tuple[str, str]:
    at = merge.find(" ", 1)
    if at < 0 or at == len(merge) - 1:
        raise ModelError(f"{PREFIX}merges[{index}] is not two tokens: {merge[:60]!r}")
    return merge[:at], merge[at + 1 :]


def _build(
    vocabulary: Vocabulary, ids: dict[str, int], merges: list[tuple[str, str]], pre: PreTokenizer
) -> Library:
    """`ids` is changed."""
    # Imported here: 10 to 25 ms that a run without text should not pay.
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    # Bytes that no token has: they vanish, but nothing is merged across them.
    missing = "".join(letter for letter in LETTER_OF_BYTE.values() if letter not in ids)
    if pre.ignore_merges:  # a word of text must not become a control token by being its name
        made = {left + right for left, right in merges}
        for token_id in vocabulary.ids_of_type(CONTROL, UNKNOWN):
            name = vocabulary.tokens[token_id]
            if name not in made:
                ids[f"\0{ids.pop(name)}"] = token_id
    try:
        model = models.BPE(ids, merges, ignore_merges=pre.ignore_merges)
    except Exception as error:
        raise ModelError(f"the merges do not fit the vocabulary: {error}") from error
    library = Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.splits]
    steps = [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if missing:
        steps.append(pre_tokenizers.Split(Regex(f"[{re.escape(missing)}]"), "removed"))
    library.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return library
