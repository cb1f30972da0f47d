"""What the engine knows of a grammar: which tokens may come next. Text and grammars live above."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # requests are imported where numpy is not wanted
    import numpy as np
    from numpy.typing import NDArray


class MaskSource(Protocol):
    """Follows the tokens of one request. Not shared between requests; used by one thread at a time."""

    def fill(self, words: NDArray[np.uint32]) -> None:
        """Write the mask of the next token: bit i of the packed words = token i is allowed.

        At least one token is allowed; when the grammar is complete that is an end token. May be called on a
        worker thread with the GIL released inside, and fill the same mask again after `rollback`.
        """
        ...

    def accept(self, token: int) -> None:
        """The request went on with `token`. ValueError when the grammar forbids it."""
        ...

    def rollback(self, count: int) -> None:
        """Take back the last `count` accepted tokens (drafts that were not verified)."""
        ...
