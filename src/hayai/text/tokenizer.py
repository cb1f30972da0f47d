"""Text to token ids and back, from the vocabulary in a model file.

Special tokens. Control tokens (`<|im_end|>`) are found in text only where the caller says so
(`special=True`), user-defined tokens always; both as llama.cpp does it: the longest token first over the
whole text, and what lies between is encoded on its own.

Text that is not Unicode. Python carries bytes that are not UTF-8 as lone surrogates
(`errors="surrogateescape"`); each one is encoded as U+FFFD, which is also what llama.cpp makes of such a byte
before byte-level BPE. Nothing raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Protocol

from hayai.errors import ModelError
from hayai.text.bpe import ByteBpe
from hayai.text.special import SpecialTokens
from hayai.text.spm import SentencePiece
from hayai.text.vocab import (
    CONTROL,
    INFILL_ROLES,
    PREFIX,
    UNKNOWN,
    USER_DEFINED,
    Joined,
    Vocabulary,
    flag,
    read_vocabulary,
    strings,
    text,
)


class Encoder(Protocol):
    """One kind of tokenizer: encodes text that holds no special tokens."""

    add_bos: bool
    add_space_prefix: bool

    def encode(self, stretch: str) -> list[int]: ...

    @staticmethod
    def pieces(vocabulary: Vocabulary) -> list[bytes]: ...


# tokenizer.ggml.model -> how to build its encoder, and the special ids that the kind implies.
Build = Callable[[Mapping[str, object], Vocabulary, dict[str, int]], Encoder]
KINDS: Mapping[str, tuple[Build, Mapping[str, int]]] = {
    "gpt2": (ByteBpe, {}),
    "llama": (SentencePiece, {"bos": 1, "eos": 2, "unk": 0}),
}
NO_VOCABULARY = ("no_vocab", "none")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """A model's tokenizer. Immutable; safe to use from several threads."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        encoder: Encoder,
        add_bos: bool,
        add_space_prefix: bool,
        strip_after: frozenset[int] = frozenset(),
    ) -> None:
        if add_bos and "bos" not in vocabulary.special:
            raise ModelError(f"{PREFIX}add_bos_token is true but the file has no {PREFIX}bos_token_id")
        self.vocabulary = vocabulary
        self.vocab_size = len(vocabulary.tokens)
        self.bos_id = vocabulary.special.get("bos")
        self.eos_id = vocabulary.special.get("eos")
        self.end_ids = vocabulary.end_ids
        self.add_bos = add_bos
        self.special_ids = frozenset(vocabulary.ids_of_type(CONTROL, UNKNOWN))
        self._encoder = encoder
        self._space_prefix = " " if add_space_prefix else ""
        self.pieces = Joined(encoder.pieces(vocabulary), b"")
        user = {vocabulary.tokens[i]: i for i in vocabulary.ids_of_type(USER_DEFINED)}
        control = {vocabulary.tokens[i]: i for i in sorted(self.special_ids)}
        self._user_tokens = SpecialTokens(user, strip_after)
        self.control_ids: Mapping[str, int] = control
        self._control_tokens = SpecialTokens(control)
        self._all_tokens = SpecialTokens(user | control, strip_after)
        edges = {token[0] for token in control} | {token[-1] for token in control}
        self.control_edges = frozenset(edge for edge in edges if not edge.isalnum() and edge not in "_-")

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> Tokenizer | None:
        """Build from `tokenizer.ggml.*` keys; None when the file holds no vocabulary.

        Raises ModelError for a kind or pre-tokenizer that is not supported and for damaged vocabularies.
        """
        model = text(metadata, "model")
        tokens = strings(metadata, "tokens")
        if model is None or model in NO_VOCABULARY or not tokens:
            return None
        if model not in KINDS:
            raise ModelError(
                f"unsupported tokenizer kind {model[:60]!r} in {PREFIX}model; "
                f"supported: {', '.join(sorted(KINDS))}"
            )
        build, defaults = KINDS[model]
        vocabulary, ids = read_vocabulary(metadata, tokens, defaults)
        encoder = build(metadata, vocabulary, ids)
        return cls(
            vocabulary,
            encoder,
            flag(metadata, "add_bos_token", encoder.add_bos),
            flag(metadata, "add_space_prefix", encoder.add_space_prefix),
            _strip_after(metadata, vocabulary),
        )

    def encode(self, text: str, *, special: bool, bos: bool | None = None) -> list[int]:
        """Token ids of `text`; `special`: find control tokens in it (False for what users wrote).

        `bos` None adds the beginning-of-sequence token where the file asks for it. An end token is never
        added.
        """
        ids: list[int] = []
        if bos or (bos is None and self.add_bos):
            if self.bos_id is None:
                raise ModelError(f"a beginning token was asked for, but the file has no {PREFIX}bos_token_id")
            ids.append(self.bos_id)
        tokens = self._all_tokens if special else self._user_tokens
        return ids + self.encode_parts(tokens.split(_clean(text)))

    def encode_infill(self, prefix: str, suffix: str) -> list[int] | None:
        """Ids that ask for the text between `prefix` and `suffix` (Bavarian et al. 2022, prefix first); None
        where the vocabulary has no tokens for it. No control tokens are looked for in either."""
        special = self.vocabulary.special
        marks = [special.get(role) for role in INFILL_ROLES]
        if None in marks:
            return None
        before, between, after = (mark for mark in marks if mark is not None)
        start = [self.bos_id] if self.add_bos and self.bos_id is not None else []
        return [*start, before, *self._bare(prefix), between, *self._bare(suffix), after]

    def _bare(self, text: str) -> list[int]:
        """Ids of a text that goes on where another one ended: without a space in front."""
        parts = self._user_tokens.split(_clean(text))
        return [
            token
            for part in parts
            for token in ([part] if isinstance(part, int) else self._encoder.encode(part))
        ]

    def split_special(self, text: str) -> list[str | int]:
        """`text` cut at control and user-defined tokens: their ids, and the stretches between them."""
        return list(self._all_tokens.split(_clean(text)))

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Ids of a text that is cut already; in the stretches no control tokens are looked for."""
        ids: list[int] = []
        after_special = True
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
                after_special = True
                continue
            for piece in self._user_tokens.split(part):
                if isinstance(piece, int):
                    ids.append(piece)
                    after_special = True
                    continue
                ids += self._encoder.encode(self._space_prefix + piece if after_special else piece)
                after_special = False
        return ids

    def break_control_tokens(self, text: str, mark: str) -> str:
        """`text` with `mark` after the first character of each control token's name in it."""
        cuts = [0, *(start + 1 for start, _, _ in self._control_tokens.find(text)), len(text)]
        return mark.join(text[start:end] for start, end in pairwise(cuts))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; a control token's are its name. IndexError outside the vocabulary."""
        if token_id < 0:
            raise IndexError(f"token id {token_id} is negative")
        return self.pieces[token_id]

    def token(self, token_id: int) -> str:
        """The token as the file spells it."""
        if token_id < 0:
            raise IndexError(f"token id {token_id} is negative")
        return self.vocabulary.tokens[token_id]

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of `ids`, bytes that are not UTF-8 replaced; `special`: control tokens appear by name."""
        skipped = frozenset() if special else self.special_ids
        return b"".join(self.token_bytes(i) for i in ids if i not in skipped).decode("utf-8", "replace")


def _strip_after(metadata: Mapping[str, object], vocabulary: Vocabulary) -> frozenset[int]:
    """Special tokens after which white space is dropped: no file says so, llama.cpp knows it of Phi-3."""
    name = str(metadata.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    special = vocabulary.ids_of_type(CONTROL, UNKNOWN, USER_DEFINED)
    ids = vocabulary.ids
    kept = {ids.get(token) for token in ("<unk>", "<s>", "<|endoftext|>")}
    return frozenset(special) - kept


def _clean(text: str) -> str:
    """`text` with lone surrogates replaced, which have no UTF-8 form."""
    if text.isascii() or not _SURROGATE.search(text):
        return text
    return _SURROGATE.sub("\ufffd", text)
