"""`hayai bench speed`: one run over the chosen cases."""

from __future__ import annotations

from hayai.bench import http_cases, process_cases
from hayai.bench.cases import RAW_CASES
from hayai.bench.peers import PeerFailure
from hayai.bench.session import Say, Session, SpeedOptions, open_session

PROCESS_CASES = {
    "start": process_cases.start,
    "memory": process_cases.memory,
    "contention": process_cases.contention,
}


def run(options: SpeedOptions, say: Say) -> Session:
    """Measure; the session that comes back is closed and holds every row."""
    raw = [case for case in RAW_CASES if case.group in options.cases]
    with open_session(options, raw, say) as session:
        for case in raw:
            session.say(f"{case.name}: {case.title}")
            session.interleave(case, [session.ours, *(s for s in session.peers if case.variant in s.choices)])
        if {"ttft", "http"} & set(options.cases):
            with http_cases.reported(session, "http"):
                http_cases.run(session, options.cases)
        for name, measure in PROCESS_CASES.items():
            if name in options.cases:
                try:
                    measure(session)
                except PeerFailure as error:
                    session.notes.append(f"{name}: {error}")
        return session
