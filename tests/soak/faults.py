"""kill -9 in the middle of load and of a batch, and ten times the load that the server can carry.

    python tests/soak/faults.py [kills] [overload] [--kills 20] [--seed N]

kills: a batch runs beside eight clients; the server is killed again and again and started on the same state.
In the end the batch has exactly one line per line of its input, in order, each with the bytes that an
undisturbed run of the same batch gives; the ledger has every complete answer of every client with its tokens,
one closed row per line of the batch, months that add up, and nothing open that is not marked as lost.

overload: the default model; first as many clients as run at once, then requests at ten times the rate that
those were served. Requests that are let in must take at most twice as long (median and 90th percentile), the
others must be told at once.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
import time
import urllib.request
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from harness import (
    Checks,
    Reply,
    Server,
    eventually,
    ledger,
    month_sums,
    options,
    quantile,
    request_bytes,
    send,
    server_of,
    start_server,
    tiny_model,
    words,
    work_folder,
)

from hayai.config import read_environment
from hayai.weights.default_model import default_model_path

TEXT = "/v1/completions"
CLIENTS = 8
LINES = 1500

# ---------------------------------------------------------------- batches without a client library


def call(
    server: Server, method: str, path: str, body: bytes | None = None, kind: str = "application/json"
) -> bytes:
    headers = {} if body is None else {"content-type": kind}
    request = urllib.request.Request(server.url + path, body, headers, method=method)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return bytes(reply.read())


def upload(server: Server, data: bytes) -> str:
    part = b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    form = (
        part % (b"purpose", b"", b"batch") + part % (b"file", b'; filename="in.jsonl"', data) + b"--b--\r\n"
    )
    return str(json.loads(call(server, "POST", "/v1/files", form, "multipart/form-data; boundary=b"))["id"])


def create_batch(server: Server, data: bytes) -> str:
    body = {"input_file_id": upload(server, data), "endpoint": TEXT, "completion_window": "24h"}
    return str(json.loads(call(server, "POST", "/v1/batches", json.dumps(body).encode()))["id"])


def batch_of(server: Server, batch_id: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(call(server, "GET", f"/v1/batches/{batch_id}"))
    return found


def lines_of(rng: Random) -> bytes:
    """A batch's input: greedy and sampled lines, with and without a seed, and some that fail."""
    rows = []
    for i in range(LINES):
        body: dict[str, Any] = {"prompt": words(rng, rng.randint(1, 20)), "max_tokens": rng.randint(10, 60)}
        body |= {"ignore_eos": True, "temperature": rng.choice((0, 1))}
        if rng.random() < 0.3:
            body["seed"] = i
        if i % 97 == 0:
            body["temperature"] = 9
        rows.append(json.dumps({"custom_id": f"line-{i}", "method": "POST", "url": TEXT, "body": body}))
    return "\n".join(rows).encode()


def output_of(server: Server, batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Every line of the output and error files."""
    rows: list[dict[str, Any]] = []
    for name in ("output_file_id", "error_file_id"):
        if batch[name]:
            text = call(server, "GET", f"/v1/files/{batch[name]}/content")
            rows += [json.loads(line) for line in text.splitlines()]
    return rows


# ---------------------------------------------------------------- kill -9


async def load(server: Server, seed: str, until: asyncio.Event) -> list[Reply]:
    """CLIENTS clients, one request after the other, until the event is set; complete answers."""
    replies: list[Reply] = []

    async def client(number: int) -> None:
        rng = Random(f"{seed}/{number}")
        while not until.is_set():
            body = {"prompt": words(rng, 8), "max_tokens": rng.randint(1, 40), "stream": rng.random() < 0.5}
            body |= {"stream_options": {"include_usage": True}} if body["stream"] else {}
            reply = await send(server, request_bytes(TEXT, json.dumps(body).encode()))
            if reply.status == 200 and reply.complete:
                replies.append(reply)
            elif not reply.status:
                await asyncio.sleep(0.01)

    await asyncio.gather(*(client(i) for i in range(CLIENTS)))
    return replies


async def one_life(server: Server, batch_id: str, rng: Random, seed: str) -> tuple[list[Reply], int, bool]:
    """Load the server and kill it at some moment; complete answers, lines of the batch that were done, and
    whether the batch was over."""
    until = asyncio.Event()
    clients = asyncio.create_task(load(server, seed, until))
    start = (await asyncio.to_thread(batch_of, server, batch_id))["request_counts"]
    begun = start["completed"] + start["failed"]
    wanted = begun + rng.randint(3, 20)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        batch = await asyncio.to_thread(batch_of, server, batch_id)
        done = batch["request_counts"]["completed"] + batch["request_counts"]["failed"]
        if done >= wanted or batch["status"] == "completed":
            break
        await asyncio.sleep(rng.uniform(0, 0.05))
    await asyncio.to_thread(server.kill)
    until.set()
    return await clients, done - begun, batch["status"] == "completed"


def undisturbed(model: Path, folder: Path, data: bytes, batch_id: str) -> dict[str, Any]:
    """The answers of the same batch in one go: custom_id -> body, without its time."""
    with server_of(model, folder, "--threads", "1") as server:
        made = create_batch(server, data)
        server.stop()
        # the same name gives the same seeds
        with sqlite3.connect(folder / "batches" / "batches.sqlite") as db:
            db.execute("UPDATE batches SET id = ? WHERE id = ?", (batch_id, made))
            db.execute("DELETE FROM results")
            db.execute("UPDATE batches SET completed = 0, failed = 0, prompt_tokens = 0, cached_tokens = 0")
        db.close()
    with server_of(model, folder, "--threads", "1") as server:
        eventually(lambda: batch_of(server, batch_id)["status"] == "completed", 300)
        return answers(output_of(server, batch_of(server, batch_id)))


def answers(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """custom_id -> what was answered: choices and usage, or the error."""
    found = {}
    for row in rows:
        body = row["response"]["body"]
        usage = body.get("usage", {})
        tokens = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
        found[row["custom_id"]] = (
            row["response"]["status_code"],
            body.get("choices"),
            tokens,
            body.get("error"),
        )
    return found


def kills(checks: Checks, folder: Path, number: int, seed: int) -> None:
    rng = Random(seed)
    model, state, data = tiny_model(folder), folder / "state", lines_of(rng)
    with server_of(model, state, "--threads", "1") as server:
        batch_id = create_batch(server, data)
        server.kill()
    replies: list[Reply] = []
    in_batch = 0
    for life in range(number):
        with server_of(model, state, "--threads", "1") as server:
            got, lines, over = asyncio.run(one_life(server, batch_id, rng, f"{seed}/{life}"))
            replies += got
            in_batch += not over
            print(f"life {life + 1}: {len(got)} answers, {lines} lines of the batch", flush=True)
    checks.that(in_batch == number, "every kill was in the middle of the batch", f"{in_batch} of {number}")
    with server_of(model, state, "--threads", "1") as server:
        over = eventually(lambda: batch_of(server, batch_id)["status"] == "completed", 300)
        batch = batch_of(server, batch_id)
        checks.that(over, "the batch comes to its end", batch["status"], batch["request_counts"])
        rows = output_of(server, batch)
        code, log = server.stop()
        checks.that(
            code == 0 and "rror" not in log, "SIGTERM ends the server cleanly", code, log.strip()[-300:]
        )
    names = [row["custom_id"] for row in rows]
    checks.that(sorted(names) == sorted(f"line-{i}" for i in range(LINES)), "one line per line", len(names))
    good = [row["custom_id"] for row in rows if row["response"]["status_code"] == 200]
    checks.that(good == sorted(good, key=lambda n: int(n[5:])), "in the order of the input", len(good))
    counts = batch["request_counts"]
    checks.that(
        counts == {"total": LINES, "completed": len(good), "failed": LINES - len(good)},
        "counted once",
        counts,
    )
    alone = undisturbed(model, folder / "alone", data, batch_id)
    same = sum(alone.get(name) == answer for name, answer in answers(rows).items())
    checks.that(same == LINES, "every line is what an undisturbed run gives", f"{same} of {LINES}")
    check_books(checks, state, replies, rows)


def check_books(checks: Checks, state: Path, replies: list[Reply], rows: list[dict[str, Any]]) -> None:
    """The ledger against what clients and the batch got."""
    book = ledger(state)
    closed = {k: r for k, r in book.items() if r.status not in ("open", "lost")}
    bad = [
        r.request_id
        for r in replies
        if r.request_id not in closed or not _same(closed[r.request_id], r.usage())
    ]
    checks.that(
        not bad, "every complete answer is on record with its tokens", f"{len(replies)} answers", *bad[:5]
    )
    bad = []
    for row in rows:
        response = row["response"]
        if response["status_code"] == 200:
            usage = response["body"]["usage"]
            entry = closed.get(response["request_id"])
            if entry is None or not _same(entry, (usage["prompt_tokens"], usage["completion_tokens"])):
                bad.append(row["custom_id"])
    checks.that(not bad, "every line of the batch is on record once, with its tokens", *bad[:5])
    sums = (
        len(closed),
        sum(r.prompt_tokens for r in closed.values()),
        sum(r.completion_tokens for r in closed.values()),
    )
    checks.that(month_sums(state) == sums, "the months add up", sums)
    got = {r.request_id for r in replies} | {row["response"]["request_id"] for row in rows}
    extra = [r for k, r in closed.items() if k not in got]
    checks.that(
        len(extra) <= CLIENTS * 25,
        "what else is on record are answers that a kill has cut off",
        f"{len(extra)} rows",
    )
    lost = [r for r in book.values() if r.status in ("open", "lost")]
    checks.that(
        all(r.completion_tokens == 0 and r.status == "lost" for r in lost),
        "what was lost costs nothing",
        len(lost),
    )


def _same(row: Any, usage: tuple[int, int] | None) -> bool:
    return (row.prompt_tokens, row.completion_tokens) == usage


# ---------------------------------------------------------------- ten times too much


def overload(checks: Checks, folder: Path, seconds: float, seed: int) -> None:
    running = 4
    rng = Random(seed)
    body = {"max_tokens": 48, "ignore_eos": True, "temperature": 0, "stream": True}

    def request() -> bytes:
        return request_bytes(TEXT, json.dumps(body | {"prompt": words(rng, 12)}).encode())

    async def full(server: Server, end: float) -> list[Reply]:
        replies: list[Reply] = []

        async def client() -> None:
            while time.monotonic() < end:
                replies.append(await send(server, request()))

        await asyncio.gather(*(client() for _ in range(running)))
        return replies

    async def flood(server: Server, rate: float, end: float) -> list[Reply]:
        tasks: list[asyncio.Task[Reply]] = []
        due = time.monotonic()
        while due < end:
            tasks.append(asyncio.create_task(send(server, request())))
            due += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        return list(await asyncio.gather(*tasks))

    model = default_model_path(read_environment().home)
    server = start_server(model, folder / "overload", "--max-sequences", str(running))
    try:
        asyncio.run(full(server, time.monotonic() + 2))  # warm
        began = time.monotonic()
        before = asyncio.run(full(server, began + seconds))
        rate = len(before) / (time.monotonic() - began)
        began = time.monotonic()
        after = asyncio.run(flood(server, 10 * rate, began + seconds))
        found = server.scrape()
    finally:
        server.kill()
    good = [r for r in after if r.status == 200 and r.complete]
    refused = [r for r in after if r.status == 429]
    offered = len(after) / seconds
    print(
        f"capacity {rate:.1f} requests/s with {running} running; offered {offered:.1f}/s for {seconds:.0f} s"
    )
    checks.that(len(good) + len(refused) == len(after), "every request is served or refused", len(after))
    for q, name in ((0.5, "median"), (0.9, "90th percentile")):
        at_capacity = quantile([r.seconds for r in before], q)
        now = quantile([r.seconds for r in good], q)
        checks.that(
            now <= 2 * at_capacity,
            f"{name} latency of accepted requests",
            f"{now:.3f} s, at capacity {at_capacity:.3f} s",
            f"{now / at_capacity:.2f}x",
            f"n={len(good)}, {len(before)}",
        )
    first = quantile([r.first for r in good], 0.5), quantile([r.first for r in before], 0.5)
    print(f"     median time to the first byte: {first[0]:.3f} s, at capacity {first[1]:.3f} s")
    quick = quantile([r.seconds for r in refused], 0.5), quantile([r.seconds for r in refused], 0.99)
    checks.that(
        quick[0] <= 0.1 and quick[1] <= 1.0,
        "the rest is refused at once",
        f"{len(refused)} refusals, median {1e3 * quick[0]:.1f} ms, 99th percentile {1e3 * quick[1]:.1f} ms",
    )
    checks.that(
        len(good) >= 0.8 * rate * seconds, "as many are served as at capacity", f"{len(good) / seconds:.1f}/s"
    )
    retry = [int(r.headers["retry-after"]) for r in refused]
    checks.that(
        all(1 <= s <= 60 for s in retry), "each with a time to come back", f"{min(retry)} to {max(retry)} s"
    )
    checks.that(found['hayai_rejected_total{reason="overloaded"}'] == len(refused), "all of them counted")


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("faults", nargs="*", choices=["kills", "overload", []], help="default: both")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each half of `overload`")
    args = parser.parse_args()
    checks = Checks()
    with work_folder(args.keep) as folder:
        if not args.faults or "kills" in args.faults:
            kills(checks, folder, args.kills, args.seed)
        if not args.faults or "overload" in args.faults:
            overload(checks, folder, args.seconds, args.seed)
    return checks.code()


if __name__ == "__main__":
    sys.exit(main())
