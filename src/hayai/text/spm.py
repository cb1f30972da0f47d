"""SentencePiece-style BPE ('llama' vocabularies): pairs are merged by the score of the token they make.

The rule is llama.cpp's `llm_tokenizer_spm_session`: start from characters; among all neighbours whose
concatenation is a token, merge the pair whose token has the highest score, the leftmost among equals; what is
no token in the end is spelled by byte tokens `<0x00>` to `<0xFF>`. One difference, on purpose: names of
control tokens don't count as tokens here, so that a user's "</s>" can't be merged into the end token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from heapq import heapify, heappop, heappush
from itertools import pairwise

from hayai.errors import ModelError
from hayai.text.vocab import BYTE, CONTROL, NORMAL, PREFIX, UNKNOWN, USER_DEFINED, Vocabulary

SPACE = "▁"
_WORDS = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
_CACHED_WORDS = 1 << 14
_CACHED_LENGTH = 32


class SentencePiece:
    """Encodes plain text (no special tokens in it) with a scored vocabulary."""

    add_bos = True
    add_space_prefix = True

    def __init__(
        self, metadata: Mapping[str, object], vocabulary: Vocabulary, ids: Mapping[str, int]
    ) -> None:
        scores = vocabulary.scores
        if scores is None:
            raise ModelError(f"a SentencePiece vocabulary needs {PREFIX}scores; the file has none")
        hidden = frozenset(vocabulary.ids_of_type(CONTROL, UNKNOWN))
        # Rank instead of score: comparing integers is cheaper, and equal scores stay equal.
        rank = {score: place for place, score in enumerate(sorted(set(scores), reverse=True))}
        self._ids = {token: i for token, i in ids.items() if i not in hidden}
        self._ranks = {token: rank[scores[i]] for token, i in self._ids.items()}
        self._bytes = _byte_ids(ids, vocabulary.special["unk"])
        # Where no token goes on from a letter to a space, words are independent and worth remembering.
        within = re.compile(f"[^{SPACE}]{SPACE}")
        self._whole = any(within.search(token) for token in self._ids)
        self._cache: dict[str, list[int]] = {}

    def encode(self, stretch: str) -> list[int]:
        """Ids of a stretch of valid Unicode text."""
        text = stretch.replace(" ", SPACE)
        if self._whole:
            return self._merge(text)
        ids: list[int] = []
        for word in _WORDS.findall(text):
            found = self._cache.get(word)
            if found is None:
                found = self._merge(word)
                if len(word) <= _CACHED_LENGTH:
                    if len(self._cache) >= _CACHED_WORDS:
                        self._cache.clear()
                    self._cache[word] = found
            ids += found
        return ids

    def _merge(self, text: str) -> list[int]:
        """Merge characters of `text` to tokens: O(n log n)."""
        ranks = self._ranks
        symbols = list(text)
        after = list(
            range(1, len(symbols) + 1)
        )  # index of the next symbol; a merged one keeps its first index
        before = list(range(-1, len(symbols) - 1))
        queue = [
            (ranks[pair], left, left + 1, len(pair))
            for left, pair in enumerate(map("".join, pairwise(symbols)))
            if pair in ranks
        ]
        heapify(queue)
        while queue:
            _, left, right, size = heappop(queue)
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != size:
                continue  # one of the two was merged with another neighbour meanwhile
            symbols[left] += symbols[right]
            symbols[right] = ""
            following = after[left] = after[right]
            previous = before[left]
            if following < len(symbols):
                before[following] = left
                pair = symbols[left] + symbols[following]
                if pair in ranks:
                    heappush(queue, (ranks[pair], left, following, len(pair)))
            if previous >= 0:
                pair = symbols[previous] + symbols[left]
                if pair in ranks:
                    heappush(queue, (ranks[pair], previous, left, len(pair)))
        ids: list[int] = []
        for symbol in filter(None, symbols):
            token_id = self._ids.get(symbol)
            if token_id is not None:
                ids.append(token_id)
            else:
                ids.extend(self._bytes[byte] for byte in symbol.encode())
        return ids

    @staticmethod
    def pieces(vocabulary: Vocabulary) -> list[bytes]:
        """The bytes that each token stands for: a special token's are its name, a placeholder has none."""
        return list(map(_piece, vocabulary.tokens, vocabulary.types))


_BYTE_NAME = re.compile("<0x([0-9A-F]{2})>")


def _piece(token: str, kind: int) -> bytes:
    if kind == NORMAL:
        return token.replace(SPACE, " ").encode()
    if kind in (CONTROL, USER_DEFINED, UNKNOWN):
        return token.encode()
    byte = _BYTE_NAME.fullmatch(token) if kind == BYTE else None
    return bytes.fromhex(byte[1]) if byte else b""


def _byte_ids(ids: Mapping[str, int], unknown: int) -> list[int]:
    """Ids of the 256 byte tokens; the unknown token stands in for those that are missing."""
    return [ids.get(f"<0x{byte:02X}>", unknown) for byte in range(256)]
