"""The determinism contract over HTTP: the same request gives the same bytes, whatever runs beside it.

A reference answer is taken alone and cold. Then the same requests are asked again in every situation that a
server under load brings, and their texts, token texts and log-probabilities are compared for equality of the
JSON numbers, which carry every bit of a float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hayai.bench.load_client import Shot
from hayai.bench.load_requests import Request
from hayai.bench.load_session import LoadSession, Repetition
from hayai.bench.load_sides import LoadSide, Room
from hayai.bench.servers import OpenAiCompletions

PARALLEL = 16
PROMPT_TOKENS = (24, 57, 128, 300)
"""Lengths that are no multiples of a block, in turn."""
ANSWER_TOKENS = 48
LONG_PROMPT = 2000
QUICK_LONG_PROMPT = 400
LOGPROBS = 3
BESIDE = 1000
"""Tags from here on are requests that only keep the server busy."""


@dataclass(frozen=True)
class Question:
    """One request of the case: half of them greedy, half sampled with a seed."""

    prompt: tuple[int, ...]
    sampling: Mapping[str, Any]


@dataclass(frozen=True)
class Situation:
    """How the questions are asked again. logprobs: all, none, or every second one ('mixed')."""

    name: str
    parallel: int
    logprobs: str
    long_prompts: int = 0


SITUATIONS = (
    Situation("alone again", 1, "all"),
    Situation("alone, no logprobs", 1, "none"),
    Situation("16 parallel", PARALLEL, "all"),
    Situation("16 parallel, no logprobs", PARALLEL, "none"),
    Situation("16 parallel, half with logprobs, beside long prompts", PARALLEL, "mixed", 3),
)
"""The first one already meets cached prefixes, where the server has a prefix cache."""


def questions(session: LoadSession, count: int) -> list[Question]:
    found = []
    for i in range(count):
        prompt = tuple(session.prompts.ids(PROMPT_TOKENS[i % len(PROMPT_TOKENS)]))
        sampled = {"temperature": 0.8, "top_p": 0.95, "seed": 1234 + i}
        sampling: dict[str, Any] = sampled if i % 2 else {}
        found.append(Question(prompt, sampling))
    return found


def bits(session: LoadSession) -> None:
    """Requests (of 16) whose answer changed in any situation; our server only."""
    count = 4 if session.options.quick else PARALLEL

    def work(side: LoadSide, pair: int) -> None:
        asked = questions(session, count)
        reference = ask(session, side, pair, asked, Situation("alone", 1, "all"))
        if pair < 0:
            return
        wanted = answers(reference)
        changed: dict[int, str] = {}
        cached = 0
        for situation in SITUATIONS:
            found = ask(session, side, pair, asked, situation)
            cached += sum(r.cached_tokens for r in found.requests if r.tag < BESIDE)
            changed = {**differences(wanted, answers(found), situation.name), **changed}
        for tag, what in sorted(changed.items()):
            session.note(f"bits: request {tag + 1} changed: {what}")
        session.row(
            "bits", reference, float(len(changed)), "changed", situations=float(len(SITUATIONS)),
            questions=float(count), cached_tokens=float(cached),
        )  # fmt: skip
        if not cached:
            session.note("bits: no prompt token came from a cache, so cached prefixes were not tested")

    with session.sides(Room(4096, PARALLEL, "cached"), None, peers=False) as sides:
        if not isinstance(sides[0].dialect, OpenAiCompletions) or session.options.text_prompts:
            session.note("bits: needs /v1/completions and prompts as token ids")
            return
        session.alternate("bits", sides, work)


def ask(
    session: LoadSession, side: LoadSide, pair: int, asked: Sequence[Question], how: Situation
) -> Repetition:
    """Ask all questions, `parallel` at a time; long cold prompts come in beside them."""
    shots: list[Shot] = []
    for tag, question in enumerate(asked):
        with_logprobs = how.logprobs == "all" or (how.logprobs == "mixed" and tag % 2 == 0)
        more = dict(question.sampling) | ({"logprobs": LOGPROBS} if with_logprobs else {})
        shots.append(
            session.shot(side, question.prompt, ANSWER_TOKENS, tag=tag, stream=False, cached=True, more=more)
        )
    queue = iter(shots)
    lanes: list[Any] = [queue for _ in range(min(how.parallel, len(shots)))]
    for i in range(how.long_prompts):
        prompt = session.prompts.ids(QUICK_LONG_PROMPT if session.options.quick else LONG_PROMPT)
        lanes.append([session.shot(side, prompt, 8, at=0.05 * i, tag=BESIDE + i, stream=False)])
    return session.turn("bits", side, pair, lanes, stream=False, about={"situation": how.name})


@dataclass(frozen=True)
class Answer:
    """What is compared. tokens and logprobs None where they were not asked for."""

    text: str
    tokens: tuple[str, ...] | None
    logprobs: Any
    failure: str


def answers(found: Repetition) -> dict[int, Answer]:
    return {r.tag: answer(r) for r in found.requests if r.tag < BESIDE}


def answer(request: Request) -> Answer:
    """An answer's text with its log-probabilities; offsets aside, which follow from the tokens."""
    probs = request.logprobs
    if not probs:
        return Answer(request.text, None, None, request.failure)
    exact = (tuple(probs["token_logprobs"]), probs.get("top_logprobs"))
    return Answer(request.text, tuple(probs["tokens"]), exact, request.failure)


def differences(wanted: Mapping[int, Answer], got: Mapping[int, Answer], situation: str) -> dict[int, str]:
    """tag -> what is not the same. Tokens and logprobs are compared where both sides have them."""
    found = {}
    for tag, first in wanted.items():
        second = got[tag]
        if first.failure or second.failure:
            found[tag] = f"failed {situation}: {first.failure or second.failure}"
        elif first.text != second.text:
            found[tag] = f"another text {situation}"
        elif None not in (first.tokens, second.tokens) and first.tokens != second.tokens:
            found[tag] = f"other tokens {situation}"
        elif None not in (first.logprobs, second.logprobs) and first.logprobs != second.logprobs:
            found[tag] = f"other log-probabilities {situation}"
    return found
