"""How much of a prompt a step may take in while others wait for their next token.

What a step costs is learnt from the steps themselves:

    seconds = decode(rows) + prompt_tokens * (c + d * position)

decode(rows): the typical pure decode step by number of sequences, straight lines in between. It follows the
median, by FASTER or SLOWER with every step. (Both were tried: a few steps that lost their core to another
process move a mean to several times the usual step, and the shortest step ignores a machine that is busy all
the time.) c and d: a straight line through (mean position, extra seconds per prompt token) of the latest
steps with prompts, weighted exponentially; d is what attention adds. Measured on the cpu backend the cost is
linear in the tokens from about three rows on, so a small chunk wastes nothing but the weights read once per
step.

The budget is the number of prompt tokens for which the predicted step stays within the target. Timing decides
here what runs together, never what comes out: chunks don't change a bit (the determinism contract).
"""

from __future__ import annotations

from bisect import bisect_left
from math import sqrt

DECODE_STEPS = 2.5
"""Default target of a mixed step, in decode steps of the same sequences."""
BACKLOG = 4096
"""Prompt tokens. When more are waiting, the default target grows in proportion: small chunks read the weights
for few tokens each, and under such a load everybody is served sooner by fewer, longer steps ..."""
READABLE_SECONDS = 0.04
"""... as long as a stream is still faster than anybody reads."""
MIN_CHUNK = 4
"""Prompt tokens that a step takes in at least: a prompt has to end."""
FIRST_CHUNK = 16
"""Before anything was measured."""
TILE_ROWS = 4
"""Rows of a matrix kernel's tile: a step's tokens are rounded down to whole tiles."""
FORGET = 0.95
SLOWER, FASTER = 1.02, 1.0 / 1.02
OUTLIER = 1.5
"""A step that took more than this times what was predicted counts no more than that: the core was taken away.
If the machine has become slower for good, the estimate follows by a few per cent per step."""
RIDGE = 64.0**2
"""Positions squared: below this spread of positions the line stays level."""


class Pacer:
    """See the module. step_ms: target of a mixed step; None: DECODE_STEPS decode steps."""

    def __init__(self, step_ms: float | None = None) -> None:
        self.step_ms = step_ms
        self._decode: dict[int, float] = {}
        self._weight = 0.0
        self._x = self._y = self._xx = self._xy = 0.0

    # ------------------------------------------------------------------ measuring

    def known(self, rows: int) -> float:
        """The typical decode step of `rows` sequences so far; 0 when there was none."""
        return self._decode.get(rows, 0.0)

    def observe_decode(self, rows: int, typical: float) -> None:
        """What `known` has become after some more steps."""
        self._decode[rows] = typical

    def observe_prompt(self, rows: int, tokens: int, position: float, seconds: float) -> None:
        """A step of `rows` decoding sequences and `tokens` prompt tokens at the mean `position`."""
        cost = max(seconds - self.decode_seconds(rows), 0.05 * seconds) / tokens
        if self._weight > 0.0:
            c, d = self._line()
            cost = min(cost, OUTLIER * (c + d * position))
        self._weight = FORGET * self._weight + 1.0
        share = 1.0 / self._weight
        self._x += share * (position - self._x)
        self._y += share * (cost - self._y)
        self._xx += share * (position * position - self._xx)
        self._xy += share * (position * cost - self._xy)

    def _line(self) -> tuple[float, float]:
        """(c, d): seconds of a prompt token at position 0, and more per position."""
        spread = self._xx - self._x * self._x
        d = max(0.0, (self._xy - self._x * self._y) / (spread + RIDGE))
        c = self._y - d * self._x
        # A line that starts below a tenth of the mean has been bent by noise.
        least = 0.1 * self._y
        if c < least and self._x > 0.0:
            c, d = least, (self._y - least) / self._x
        return c, d

    # ------------------------------------------------------------------ predicting

    def decode_seconds(self, rows: int) -> float:
        """A pure decode step of `rows` sequences; 0 when there are none or nothing was measured."""
        if rows == 0 or not self._decode:
            return 0.0
        found = self._decode.get(rows)
        if found is not None:
            return found
        known = sorted(self._decode)
        at = bisect_left(known, rows)
        if at == 0:
            return self._decode[known[0]]
        below = known[at - 1]
        if at == len(known):
            return self._decode[below] + (rows - below) * self._y
        above = known[at]
        part = (rows - below) / (above - below)
        return (1.0 - part) * self._decode[below] + part * self._decode[above]

    def target_seconds(self, rows: int, backlog: int = 0) -> float:
        """How long a step with `rows` decoding sequences may take, while `backlog` prompt tokens wait."""
        if self.step_ms is not None:
            return self.step_ms / 1e3
        usual = DECODE_STEPS * self.decode_seconds(rows)
        return usual if backlog <= BACKLOG else max(usual, min(usual * backlog / BACKLOG, READABLE_SECONDS))

    def prompt_tokens(self, rows: int, position: int, backlog: int = 0) -> int:
        """Prompt tokens, from `position` on, for a step in which `rows` sequences decode."""
        if self._weight == 0.0 or not self._decode:
            return FIRST_CHUNK
        allowed = self.target_seconds(rows, backlog) - self.decode_seconds(rows)
        c, d = self._line()
        slope = c + d * position
        if allowed <= 0.0 or slope <= 0.0:
            return MIN_CHUNK
        # d/2 n^2 + slope n = allowed, in the form that keeps its digits where d is next to nothing
        count = int(2.0 * allowed / (slope + sqrt(slope * slope + 2.0 * d * allowed)))
        count = (rows + count) // TILE_ROWS * TILE_ROWS - rows
        return max(MIN_CHUNK, count)
