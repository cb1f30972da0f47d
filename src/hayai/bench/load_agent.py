"""Recorded agent conversations against servers, turn by turn: what an agent's user waits for."""

from __future__ import annotations

from collections.abc import Sequence

from hayai.bench.arrivals import data_file
from hayai.bench.conversations import FILE, FOLDER, Message, Recording, Turn, read_recordings, turns
from hayai.bench.load_cases import cached_probe
from hayai.bench.load_metrics import median
from hayai.bench.load_session import LoadSession
from hayai.bench.load_sides import LoadSide, Room
from hayai.errors import ConfigError, RequestError
from hayai.frontend import Prompt as FrontendPrompt

CONTEXT = 8192
NEW_TOKENS = 500
"""The most that a turn adds to its prompt."""
FIRST_TOKENS = 4096
"""The most that a conversation starts with."""
ANSWER_TOKENS = 16
QUICK_CONTEXT = 1024


def agent(session: LoadSession) -> None:
    """Median TTFT of the turns after the first (cached prefix, few new tokens), and of first turns."""
    recordings = read_recordings(data_file(session.options.data, FOLDER, FILE))
    if not recordings:
        raise ConfigError(f"{FILE} holds no agent conversation")
    drawn: list[list[list[Turn]]] = []

    def draw(pair: int) -> None:
        drawn.append([replay_turns(session, recording, pair) for recording in recordings])
        if pair == 0:
            describe(session, recordings, drawn[-1])

    def work(side: LoadSide, pair: int) -> None:
        conversations = drawn[-1]
        if pair < 0:
            conversations = [conversations[0][:2]]
        # one user goes through all conversations: a turn comes when the last answer is complete
        asked = [turn for conversation in conversations for turn in conversation]
        shots = [
            session.shot(side, prompt_of(session, turn), ANSWER_TOKENS, tag=tag, cached=True)
            for tag, turn in enumerate(asked)
        ]
        found = session.turn("agent", side, pair, [shots])
        later = [(r, asked[r.tag]) for r in found.requests if r.ok and asked[r.tag].number]
        first = [r.ttft for r in found.requests if r.ok and not asked[r.tag].number]
        cached = sum(r.cached_tokens for r, _ in later) / max(1, sum(r.prompt_tokens for r, _ in later))
        session.row("agent-first", found, median(first) * 1e3, "ms")
        session.row(
            "agent", found, median([r.ttft for r, _ in later]) * 1e3, "ms", turns=float(len(later)),
            cached_share=cached, new_tokens=median([float(t.new_tokens) for _, t in later]),
        )  # fmt: skip

    with session.sides(Room(CONTEXT, 2, "cached"), cached_probe(session)) as sides:
        session.alternate("agent", sides, work, draw)


def replay_turns(session: LoadSession, recording: Recording, pair: int) -> list[Turn]:
    """The turns of a recording, with a first line of their own in every pair."""

    def encode(messages: Sequence[Message]) -> Sequence[int] | None:
        try:
            return session.frontend.encode(FrontendPrompt(messages=tuple(messages)))
        except RequestError as error:
            if error.code != "context_length_exceeded":
                raise
            return None

    most = QUICK_CONTEXT if session.options.quick else CONTEXT
    mark = f"Session {session.options.seed}-{pair + 1}: {session.prompts.text(8)}"
    return turns(
        recording, encode, mark=mark, context=min(most, CONTEXT) - ANSWER_TOKENS - 1,
        new_tokens=NEW_TOKENS, first_tokens=min(FIRST_TOKENS, most // 2),
    )  # fmt: skip


def prompt_of(session: LoadSession, turn: Turn) -> str | tuple[int, ...]:
    return session.text_of(turn.ids) if session.options.text_prompts else turn.ids


def describe(
    session: LoadSession, recordings: Sequence[Recording], conversations: Sequence[Sequence[Turn]]
) -> None:
    for recording, found in zip(recordings, conversations, strict=True):
        recorded = sum(1 for m in recording.messages if m["role"] == "assistant")
        clipped = sum(turn.clipped for turn in found)
        session.note(
            f"agent: {recording.name}: {len(found)} of {recorded} turns fit; prompts of "
            f"{len(found[0].ids) if found else 0} to {len(found[-1].ids) if found else 0} tokens; "
            f"{clipped} turns had messages clipped so that they add at most {NEW_TOKENS} tokens"
        )
