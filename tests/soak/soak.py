"""10,000 requests of clients as they are: some leave, some dawdle, some send nonsense.

    python tests/soak/soak.py [--requests 10000] [--parallel 16] [--seed N]

A third of the requests are polite; the others leave before, in the middle of or at the end of the answer,
read slowly, break off their own request, send bodies that are not JSON or not valid, or ask for what can't be
served. Then it must hold that:
* memory grew by at most 5 % since the first 1,000 requests (or a tenth, if fewer were asked for);
* nothing runs or waits, and every KV block without an owner is free or cached;
* no answer was a 5xx;
* every complete answer has its ledger row with exactly its tokens; nobody got more than the ledger says;
  the months' sums are the sums of the rows;
* SIGTERM ends the server with 0.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from harness import (
    POLITE,
    Checks,
    LedgerRow,
    Manners,
    Reply,
    Server,
    eventually,
    ledger,
    month_sums,
    options,
    request_bytes,
    send,
    server_of,
    tiny_model,
    words,
    work_folder,
)

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
Case = tuple[bytes, Manners]


def _body(rng: Random, **more: Any) -> tuple[str, dict[str, Any]]:
    """A valid request: chat or text, sampled or greedy, streamed or not, some with a shared beginning."""
    prompt = words(rng, rng.choice((2, 8, 30)))
    if rng.random() < 0.3:
        prompt = "A beginning that many prompts share, long enough to fill a few blocks. " * 3 + prompt
    body: dict[str, Any] = {"max_tokens": rng.randint(1, 24), "stream": rng.random() < 0.7}
    body["temperature"] = rng.choice((0, 1))
    if rng.random() < 0.1:
        body["n"] = rng.randint(2, 4)
    if rng.random() < 0.1:
        body["stop"] = ["e", "zz"]
    body |= more
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    if rng.random() < 0.5:
        return CHAT, body | {"messages": [{"role": "user", "content": prompt}]}
    return TEXT, body | {"prompt": prompt}


def polite(rng: Random) -> Case:
    path, body = _body(rng)
    return request_bytes(path, json.dumps(body).encode()), POLITE


def leaves(rng: Random) -> Case:
    """In the head of the answer, or somewhere in a long stream."""
    path, body = _body(rng, max_tokens=200, ignore_eos=True, stream=True)
    return request_bytes(path, json.dumps(body).encode()), Manners(
        leave_after=rng.choice((0, 1, 300, 3000, 20_000))
    )


def dawdles(rng: Random) -> Case:
    """Reads half a kilobyte at a time."""
    path, body = _body(rng, max_tokens=60, ignore_eos=True, stream=True)
    return request_bytes(path, json.dumps(body).encode()), Manners(pause=rng.uniform(0.001, 0.02))


def breaks_off(rng: Random) -> Case:
    """The connection ends inside the request."""
    path, body = _body(rng)
    raw = request_bytes(path, json.dumps(body).encode())
    return raw, Manners(send=rng.randrange(1, len(raw)))


def bad_body(rng: Random) -> Case:
    path, body = _body(rng)
    kind = rng.randrange(5)
    if kind == 0:
        return request_bytes(path, rng.randbytes(rng.randrange(400))), POLITE
    if kind == 1:
        raw = json.dumps(body).encode()
        return request_bytes(path, raw[: rng.randrange(len(raw))]), POLITE
    if kind == 2:
        body[rng.choice(("temperature", "max_tokens", "n", "stop", "seed"))] = rng.choice(
            (-7, "x", [1], {}, 1e300)
        )
    elif kind == 3:
        body["unheard_of"] = 1
    else:
        body["messages" if path == CHAT else "prompt"] = rng.choice((None, 5, {}, [], [[]], [None]))
    return request_bytes(path, json.dumps(body).encode()), POLITE


def oversized(rng: Random) -> Case:
    """More than the context holds, as text or as token ids; now and then more than a body may have."""
    if rng.random() < 0.02:
        return request_bytes(TEXT, b" " * (33 << 20)), POLITE
    long: Any = words(rng, 4000) if rng.random() < 0.5 else [5] * rng.choice((513, 5000, 50_000))
    return request_bytes(TEXT, json.dumps({"prompt": long, "max_tokens": 4}).encode()), POLITE


KINDS: tuple[tuple[Callable[[Random], Case], int], ...] = (
    (polite, 35),
    (leaves, 20),
    (dawdles, 10),
    (breaks_off, 10),
    (bad_body, 15),
    (oversized, 10),
)
"""(kind of client, its share in hundredths)."""


async def run(
    server: Server, number: int, parallel: int, seed: int, at: dict[int, Callable[[], None]]
) -> list[tuple[str, Reply]]:
    """All requests, `parallel` at a time. `at`: called when so many are done."""
    kinds = [kind for kind, share in KINDS for _ in range(share)]
    results: list[tuple[str, Reply]] = []
    numbers = iter(range(number))

    async def client() -> None:
        for i in numbers:
            rng = Random(f"{seed}/{i}")
            kind = rng.choice(kinds)
            reply = await send(server, *kind(rng))
            results.append((kind.__name__, reply))
            if len(results) in at:
                at[len(results)]()

    await asyncio.gather(*(client() for _ in range(parallel)))
    return results


def check_ledger(checks: Checks, folder: Path, results: list[tuple[str, Reply]]) -> None:
    rows = ledger(folder)
    complete = [(r, r.usage()) for _, r in results if r.status == 200 and r.complete]
    wrong = [
        r.request_id for r, usage in complete if usage is None or not _agrees(rows.get(r.request_id), usage)
    ]
    checks.that(
        not wrong,
        "every complete answer is on record with its tokens",
        f"{len(complete)} answers",
        *wrong[:5],
    )
    more = 0
    partial = [r for _, r in results if r.status == 200 and not r.complete and r.request_id]
    for reply in partial:
        row = rows.get(reply.request_id)
        got = sum(bool(_text(c)) for event in reply.events() for c in event.get("choices", []))
        more += row is None or got > row.completion_tokens
    checks.that(not more, "nobody got more than is on record", f"{len(partial)} answers cut off")
    closed = [row for row in rows.values() if row.status not in ("open", "lost")]
    sums = (len(closed), sum(r.prompt_tokens for r in closed), sum(r.completion_tokens for r in closed))
    checks.that(month_sums(folder) == sums, "the months add up", sums)
    checks.that(
        len(closed) == len(rows),
        "no row is left open",
        f"{len(rows)} rows",
        Counter(r.status for r in rows.values()),
    )


def _agrees(row: LedgerRow | None, usage: tuple[int, int]) -> bool:
    return row is not None and (row.prompt_tokens, row.completion_tokens) == usage


def _text(choice: dict[str, Any]) -> str:
    return str(choice.get("text") or (choice.get("delta") or {}).get("content") or "")


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--parallel", type=int, default=16)
    args = parser.parse_args()
    checks = Checks()
    with (
        work_folder(args.keep) as folder,
        server_of(tiny_model(folder), folder / "state", "--threads", "1") as server,
    ):
        sizes: dict[str, int] = {}
        early = min(1000, max(1, args.requests // 10))
        at = {early: lambda: sizes.setdefault("early", server.rss)}
        began = time.monotonic()
        results = asyncio.run(run(server, args.requests, args.parallel, args.seed, at))
        seconds = time.monotonic() - began
        idle = eventually(lambda: server.scrape()["hayai_in_flight_choices"] == 0)
        late = server.rss
        found = server.scrape()
        statuses = Counter(reply.status for _, reply in results)
        print(
            f"{len(results)} requests in {seconds:.0f} s; answers by status: {dict(statuses.most_common())}"
        )
        growth = late / sizes["early"] - 1
        checks.that(
            growth <= 0.05,
            f"memory after {early} requests and at the end",
            f"{sizes['early'] / 2**20:.1f} MiB, {late / 2**20:.1f} MiB",
            f"{growth:+.1%}",
        )
        checks.that(idle and not found["hayai_engine_running"], "nothing runs or waits")
        checks.that(found["hayai_kv_used_tokens"] == 0, "every KV block is given back")
        open_requests = sum(v for k, v in found.items() if k.startswith("hayai_requests_in_flight"))
        checks.that(open_requests == 0, "every request that began has ended", open_requests)
        checks.that(not [s for s in statuses if s >= 500], "no answer was a 5xx")
        checks.that(statuses[200] > args.requests // 4, "polite clients were served", statuses[200])
        code, log = server.stop()
        checks.that(
            code == 0 and "rror" not in log, "SIGTERM ends the server cleanly", code, log.strip()[-300:]
        )
        check_ledger(checks, folder / "state", results)
    return checks.code()


if __name__ == "__main__":
    sys.exit(main())
