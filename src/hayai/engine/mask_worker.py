"""Grammar masks off the critical path: a worker thread follows the tokens while the engine does other things.

As soon as a token is committed, `Grammar.advance` queues it; the worker tells the grammar and fills the mask
of the next token (the grammar library works without the GIL), while the engine's thread delivers events and
schedules. `Grammar.wait` right before the backend call takes what is left of that time.

An error of a grammar is kept and its mask opened, so that the step runs for everybody else; the engine ends
that request alone when it commits the step.
"""

from __future__ import annotations

import threading
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from hayai.engine.mask import MaskSource

CLOSE_SECONDS = 5.0

START = -1
"""Instead of a token: fill the first mask."""


class Grammar:
    """The mask of one request: `words` is stable from `wait` until `advance`, and always the same array."""

    __slots__ = ("_busy", "_source", "error", "words")

    def __init__(self, source: MaskSource, vocab_size: int) -> None:
        self._source = source
        self._busy = threading.Lock()  # held from advance() until the worker is done
        self.words: NDArray[np.uint32] = np.zeros(-(-vocab_size // 32), np.uint32)
        self.error: str | None = None

    def wait(self) -> None:
        """Until the mask is there."""
        with self._busy:
            pass

    def follow(self, token: int) -> None:
        """The worker's part: accept the token, fill the next mask. Never raises."""
        try:
            if token != START:
                self._source.accept(token)
            self._source.fill(self.words)
            if not self.words.any():
                self.error = "the grammar allows no token"
        except Exception as error:
            # Whatever a grammar library can raise on what a client wrote is that client's alone.
            self.error = f"the grammar failed: {type(error).__name__}: {error}"
        finally:
            if self.error is not None:
                self.words.fill(0xFFFFFFFF)
            self._busy.release()

    def claim(self) -> None:
        """Mark the mask as not there; the worker's `follow` ends that."""
        taken = self._busy.acquire(blocking=False)
        assert taken, "a mask is advanced twice"


class MaskWorker:
    """One thread for all grammars, started by the first one."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Grammar, int] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def advance(self, grammar: Grammar, token: int) -> None:
        """Queue a committed token (or START)."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hayai-masks", daemon=True)
            self._thread.start()
        grammar.claim()
        self._jobs.put((grammar, token))

    def close(self) -> None:
        """End the thread once it has done what is queued; one that hangs in a grammar is left behind."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(CLOSE_SECONDS)
            self._thread = None

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            grammar, token = job
            grammar.follow(token)
