"""Who is next: priorities, and inside one priority the tenant that has been served least.

Fair sharing by virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024):
each tenant of a priority has a counter of what was computed for it, and the lowest counter goes first. A
tenant that comes back after a pause starts at least at the lowest counter of those that are busy (of the last
one that was, when none is), so that a pause earns no credit, what was had while nobody else wanted it costs
none, and one that has just had more than its share gains nothing by a pause.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from hayai.engine.sequence import Sequence

OUTPUT_COST = 4
"""A decoded token costs about as much as four tokens of a prompt: it has to read the weights again."""
MAX_LOOK = 16
"""How far behind the first of its requests a tenant's queue is looked through."""
MANY_SHARES = 64


class Share:
    """What one tenant waits for and has had, in one priority. served: prompt tokens, outputs weighted."""

    __slots__ = ("num_running", "priority", "served", "waiting")

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.served = 0
        self.num_running = 0
        self.waiting: deque[Sequence] = deque()

    @property
    def busy(self) -> bool:
        """Whether the tenant has anything here now."""
        return bool(self.waiting) or self.num_running > 0


class Queue:
    """The waiting sequences of all tenants, and what each tenant has been served.

    num_tokens: known tokens of all waiting sequences together.
    """

    def __init__(self) -> None:
        self._shares: dict[int, dict[str, Share]] = {}
        self._last: dict[int, int] = {}  # by priority: the counter of the last tenant that was busy
        self._size = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return self._size

    def share(self, sequence: Sequence) -> Share:
        """The share of a sequence that waits or runs."""
        return self._shares[sequence.priority][sequence.tenant]

    def add(self, sequence: Sequence, running: Iterable[Sequence]) -> None:
        """Queue a new sequence behind the others of its tenant."""
        priority = sequence.priority
        shares = self._shares.setdefault(priority, {})
        share = shares.get(sequence.tenant)
        if share is None or not share.busy:
            self.settle(running)
            floor = min((s.served for s in shares.values() if s.busy), default=self._last.get(priority, 0))
            if share is None:
                self._forget(shares, floor)
                share = shares[sequence.tenant] = Share(priority)
            share.served = max(share.served, floor)
        share.waiting.append(sequence)
        self._size += 1
        self.num_tokens += len(sequence.tokens)

    def put_back(self, sequence: Sequence) -> None:
        """Queue a preempted sequence before the others of its tenant."""
        self.left(sequence)
        self.share(sequence).waiting.appendleft(sequence)
        self._size += 1
        self.num_tokens += len(sequence.tokens)

    def remove(self, sequence: Sequence) -> None:
        """Take a waiting sequence out."""
        share = self.share(sequence)
        share.waiting.remove(sequence)
        self._size -= 1
        self.num_tokens -= len(sequence.tokens)
        self._last[share.priority] = share.served

    def start(self, sequence: Sequence) -> None:
        """A waiting sequence runs now."""
        self.remove(sequence)
        self.share(sequence).num_running += 1

    def left(self, sequence: Sequence) -> None:
        """A running sequence has stopped running."""
        self.settle((sequence,))
        share = self.share(sequence)
        share.num_running -= 1
        self._last[share.priority] = share.served

    def charge_prompt(self, sequence: Sequence, start: int, stop: int) -> None:
        """Count prompt tokens that run for the first time: computing them again is not the tenant's doing,
        and what the prefix cache gives costs nothing."""
        stop = min(stop, sequence.num_prompt)
        if stop > sequence.num_charged:
            self.share(sequence).served += stop - max(start, sequence.num_charged)
            sequence.num_charged = stop

    def settle(self, running: Iterable[Sequence]) -> None:
        """Count the tokens that were decoded since the last time: not done in every step."""
        for sequence in running:
            outputs = len(sequence.tokens) - sequence.num_prompt
            if outputs > sequence.num_settled:
                self.share(sequence).served += OUTPUT_COST * (outputs - sequence.num_settled)
                sequence.num_settled = outputs

    def order(self, running: Iterable[Sequence] = ()) -> Iterator[Sequence]:
        """Waiting sequences, the one to be admitted next first: at most MAX_LOOK of each tenant."""
        self.settle(running)
        for priority in sorted(self._shares):
            waiting = [share for share in self._shares[priority].values() if share.waiting]
            for share in sorted(waiting, key=lambda s: (s.served, s.num_running)):
                for at in range(min(MAX_LOOK, len(share.waiting))):
                    yield share.waiting[at]

    def everything(self) -> list[Sequence]:
        """All waiting sequences, by priority and tenant."""
        return [
            sequence
            for _, shares in sorted(self._shares.items())
            for share in sorted(shares.values(), key=lambda s: s.served)
            for sequence in share.waiting
        ]

    def by_priority(self) -> dict[int, int]:
        """How many wait, for every priority that was ever asked for. Safe from any thread."""
        return {
            priority: sum(len(share.waiting) for share in list(shares.values()))
            for priority, shares in list(self._shares.items())
        }

    @staticmethod
    def _forget(shares: dict[str, Share], floor: int) -> None:
        """Drop idle tenants whose counter says nothing any more: they would start at `floor` anyway."""
        if len(shares) >= MANY_SHARES:
            for tenant in [t for t, s in shares.items() if not s.busy and s.served <= floor]:
                del shares[tenant]
