"""Token ids to text as they come: never half a UTF-8 sequence, in sum what decoding all at once gives."""

from __future__ import annotations

import codecs

from hayai.text.tokenizer import Tokenizer


class Detokenizer:
    """Incremental decoder of one sequence of tokens.

    The concatenation of every `push` and the final `flush` equals
    `b"".join(bytes of the tokens).decode("utf-8", "replace")`.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special: bool = True, shown: frozenset[int] = frozenset()
    ) -> None:
        """skip_special: control tokens are no text, but those in `shown`, which appear by name."""
        self._pieces = tokenizer.pieces
        self._skipped = tokenizer.special_ids - shown if skip_special else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Text that became complete with this token, maybe empty. IndexError outside the vocabulary."""
        if token_id in self._skipped:
            return ""
        if token_id < 0:
            raise IndexError(f"token id {token_id} is negative")
        return self._decoder.decode(self._pieces[token_id])

    def flush(self) -> str:
        """What is left of an unfinished sequence, as replacement characters; the decoder starts afresh."""
        rest = self._decoder.decode(b"", True)
        self._decoder.reset()
        return rest
