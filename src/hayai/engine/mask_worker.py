"""Grammar masks off the critical path: a worker thread follows the tokens while the engine does other things.

As soon as a token is committed, `Grammar.advance` queues it; the worker tells the grammar and fills the mask
of the next token (the grammar library works without the GIL), while the engine's thread delivers events and
schedules. `Grammar.wait` right before the backend call takes what is left of that time, within bounds: a
sequence whose mask is late sits out, and a grammar whose masks cost too much ends its request.

An error of a grammar is kept and its mask opened, so that the step runs for everybody else; the engine ends
that request alone when it commits the step.
"""

from __future__ import annotations

import threading
from queue import SimpleQueue
from time import thread_time

import numpy as np
from numpy.typing import NDArray

from hayai.engine.mask import MaskSource

CLOSE_SECONDS = 5.0

FREE_SECONDS = 0.005
MAX_EXCESS_SECONDS = 1.0
MAX_MASK_SECONDS = 0.25
"""What the masks of one request may cost, in the worker's own processor time (a machine that is busy with
other things is nobody's fault): one mask at most MAX_MASK_SECONDS, all of them MAX_EXCESS_SECONDS beyond
FREE_SECONDS each."""

START = -1
"""Instead of a token: fill the first mask."""


class Grammar:
    """The mask of one request: `words` is stable from `wait` until `advance`, and always the same array."""

    __slots__ = ("_busy", "_excess", "_late", "_source", "error", "words")

    def __init__(self, source: MaskSource, vocab_size: int) -> None:
        self._source = source
        self._busy = threading.Lock()  # held from advance() until the worker is done
        self.words: NDArray[np.uint32] = np.zeros(-(-vocab_size // 32), np.uint32)
        self.error: str | None = None
        self._late = False
        self._excess = 0.0

    def wait(self, seconds: float) -> bool:
        """Wait that long at most (0 or less: not at all) for the mask; whether it is there. One that is not
        is late from then on."""
        self._late = not self._busy.acquire(timeout=max(seconds, 0.0))
        if not self._late:
            self._busy.release()
        return not self._late

    def is_late(self) -> bool:
        """Whether somebody waited for the mask in vain, and it is still not there."""
        return self._late and not self.wait(0)

    def follow(self, token: int) -> None:
        """The worker's part: accept the token, fill the next mask. Never raises."""
        began = thread_time()
        try:
            if token != START:
                self._source.accept(token)
            self._source.fill(self.words)
            if not self.words.any():
                self.error = "the grammar allows no token"
            self._charge(thread_time() - began)
        except Exception as error:
            # Whatever a grammar library can raise on what a client wrote is that client's alone.
            self.error = f"the grammar failed: {type(error).__name__}: {error}"
        finally:
            if self.error is not None:
                self.words.fill(0xFFFFFFFF)
            self._busy.release()

    def _charge(self, seconds: float) -> None:
        """Count what a mask cost; an error when that is more than one request may take from the others."""
        self._excess += max(0.0, seconds - FREE_SECONDS)
        if seconds > MAX_MASK_SECONDS:
            self.error = f"the grammar is too expensive: one token's mask took {seconds:.2f} s to compute"
        elif self._excess > MAX_EXCESS_SECONDS:
            self.error = (
                f"the grammar is too expensive: its masks took {self._excess:.2f} s more than "
                f"{FREE_SECONDS * 1e3:.0f} ms each"
            )

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
