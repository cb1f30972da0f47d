"""Runs the lines of batches beside what people wait for, and picks them up again after a crash.

One task per tenant takes its batches one after the other; all of them take turns for places to run a line in.
How many places there are is asked anew for every line: `parallel` on an idle server, one while somebody waits
for an answer, none while somebody waits for a place. A line runs on the path of every request, with batch
priority.

A line that is run again after a crash is the same request: its id comes from the batch and its number, and so
does the seed of one that names none, so it gives the same tokens (the determinism contract), and the ledger,
which closes an id once, counts it once. A line that a stopping server cut off is another attempt with another
id: what it had used is on record already.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import logging
import sqlite3
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from hayai.engine.request import BATCH
from hayai.errors import RequestError
from hayai.server.batch_store import OPEN, Batch, BatchStore, Result
from hayai.server.context import ServerContext
from hayai.server.errors import ApiError, as_api_error
from hayai.server.handle import Parse, run_job
from hayai.server.job import Job
from hayai.server.openai import parse_chat, parse_completion
from hayai.server.replies import REPLIES

ENDPOINTS: Mapping[str, Parse] = {
    "/v1/chat/completions": parse_chat,
    "/v1/completions": parse_completion,
}
"""What the lines of a batch may call."""

MAX_LINES = 50_000
MAX_CUSTOM_ID = 512
MAX_ERRORS = 50
"""Of validation, that are listed."""
POLL_SECONDS = 2.0
"""How soon batches are seen that another process entered, and how often one that can't go on tries again."""
TURN_SECONDS = 0.05
"""How soon a place that became free is seen."""
LOOK_SECONDS = 0.5
"""How soon a batch that was cancelled stops."""
MAX_LATER_SECONDS = 30.0

_log = logging.getLogger("hayai.server")
_LINE_FIELDS = frozenset({"custom_id", "method", "url", "body"})

REVOKED = (("invalid_api_key", "the key that made this batch has been revoked", None, None),)

PASSING = frozenset(
    {
        "overloaded",
        "rate_limit_exceeded",
        "too_many_parallel_requests",
        "shutting_down",
        "engine_unavailable",
        "ledger_unavailable",
    }
)
"""Codes of errors that pass: such a line is tried again. All others are the line's result."""

MAX_ENGINE_FAILURES = 3
"""Times that the engine may fail under a line before that is the line's result."""


@dataclass
class _Running:
    """A batch while it is run."""

    batch: Batch
    waiting: list[tuple[float, int, bytes]] = field(default_factory=list)
    """Lines to try again, soonest first (a heap): monotonic time, number, bytes."""
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    results: list[Result] = field(default_factory=list)
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)


class BatchRunner:
    """All batches of one state folder. `start` and `stop` belong to the server's life span.

    parallel: lines that run at once on an idle server.
    """

    def __init__(self, context: ServerContext, store: BatchStore, parallel: int) -> None:
        self.context = context
        self.store = store
        self.parallel = parallel
        self.num_running = 0
        self.num_lines = 0
        """Lines that have their result since the start."""
        self._main: asyncio.Task[None] | None = None
        self._tenants: dict[str, asyncio.Task[None]] = {}
        self._queue: deque[asyncio.Future[None]] = deque()
        self._turns: asyncio.TimerHandle | None = None
        self._wake = asyncio.Event()

    async def start(self) -> None:
        """Begin, with what an earlier process left."""
        self._main = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Stop for now; lines that run have to be ended by the gate."""
        tasks = [task for task in (self._main, *self._tenants.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.store.close()

    def wake(self) -> None:
        """Something has changed in the store: a new batch, or one to cancel."""
        self._wake.set()

    # ------------------------------------------------------------------ who is next

    async def _run(self) -> None:
        while True:
            try:
                await self._look()
            except (sqlite3.Error, OSError) as error:
                _log.error("batches: %s", error)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), POLL_SECONDS)
            self._wake.clear()

    async def _look(self) -> None:
        """Give every tenant with work its task, and drop files whose time is over."""
        if self.context.gate.closing or not await asyncio.to_thread(self.store.claim):
            return
        batches = await asyncio.to_thread(self.store.unfinished)
        for tenant in {batch.tenant for batch in batches}:
            task = self._tenants.get(tenant)
            if task is None or task.done():
                self._tenants[tenant] = asyncio.create_task(self._serve(tenant))
        used = {batch.input_file_id for batch in batches}
        for file_id in await asyncio.to_thread(self.store.expired_files, time.time()):
            if file_id not in used:
                await asyncio.to_thread(self.store.delete_file, file_id)

    async def _serve(self, tenant: str) -> None:
        """One tenant's batches, oldest first, until there are none."""
        while not self.context.gate.closing:
            batches = [b for b in await asyncio.to_thread(self.store.unfinished) if b.tenant == tenant]
            if not batches:
                return
            try:
                if not await self._process(batches[0]):
                    await asyncio.sleep(POLL_SECONDS)
            except FileNotFoundError as error:
                errors = (("file_not_found", f"the input is gone: {error}", "input_file_id", None),)
                await self._update(batches[0], OPEN, status="failed", errors=errors)
            except Exception as error:  # a full disk, mostly: nothing is lost, try again
                _log.error("batch %s: %s", batches[0].id, error, exc_info=error)
                await asyncio.sleep(POLL_SECONDS)

    async def _take_place(self, wanted: Callable[[], Awaitable[bool]]) -> bool:
        """Wait for a turn to run a line, as long as it is `wanted`; whether there is one. Then `_leave_place`
        gives it back."""
        turn = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        self._give_turns()
        try:
            while not turn.done():
                await asyncio.wait((turn,), timeout=LOOK_SECONDS)
                if not turn.done() and not await wanted() and not turn.done():
                    turn.cancel()
                    return False
        except BaseException:
            if not turn.cancel():
                self._leave_place()
            raise
        return True

    def _leave_place(self) -> None:
        self.num_running -= 1
        self._give_turns()

    def _give_turns(self) -> None:
        while self._queue and self.num_running < self._allowed():
            turn = self._queue.popleft()
            if not turn.done():
                self.num_running += 1
                turn.set_result(None)
        if self._queue and self._turns is None:
            self._turns = asyncio.get_running_loop().call_later(TURN_SECONDS, self._next_turns)

    def _next_turns(self) -> None:
        self._turns = None
        self._give_turns()

    def _allowed(self) -> int:
        gate = self.context.gate
        if gate.closing or gate.num_choices >= gate.max_running:
            return 0
        return 1 if gate.num_choices else self.parallel

    # ------------------------------------------------------------------ a batch's life

    async def _process(self, batch: Batch) -> bool:
        """Take a batch as far as it goes; whether that is its end."""
        principal = self.context.access.principal(batch.key_id)
        if principal is None:
            await self._revoked(batch)
        elif batch.status == "validating":
            await self._validate(batch)
        batch = await self._fresh(batch)
        if principal is not None and batch.status == "in_progress":
            await self._run_lines(_Running(batch))
            batch = await self._fresh(batch)
        if batch.final:
            return True
        status = _outcome(batch)
        if status is None:
            return False
        if batch.status == "in_progress":
            # with the outcome: once `_give_up` has begun, the counts no longer tell it
            entered = await self._update(batch, ("in_progress",), status="finalizing", outcome=status)
            if entered is None:
                return False  # cancelled just now
            batch = entered
        if status != "completed":
            await self._give_up(batch, status)
        await asyncio.to_thread(self.store.finalize, batch, status)
        return True

    async def _fresh(self, batch: Batch) -> Batch:
        found = await asyncio.to_thread(self.store.batch, batch.tenant, batch.id)
        assert found is not None, "batches are never deleted"
        return found

    async def _update(self, batch: Batch, expected: tuple[str, ...], **changes: Any) -> Batch | None:
        return await asyncio.to_thread(lambda: self.store.update_batch(batch.id, expected, **changes))

    async def _revoked(self, batch: Batch) -> None:
        await self._update(batch, ("validating", "in_progress"), status="cancelling", errors=REVOKED)

    async def _validate(self, batch: Batch) -> Batch | None:
        """'in_progress' where every line is a request, else 'failed' with the reasons."""
        max_bytes = self.context.config.max_body_bytes
        found = await asyncio.to_thread(check_lines, self.store, batch, max_bytes)
        if found.errors:
            changes: dict[str, Any] = {"status": "failed", "errors": found.errors}
        else:
            changes = {"status": "in_progress", "total": found.total, "model": found.model}
        return await self._update(batch, ("validating",), **changes)

    async def _run_lines(self, running: _Running) -> None:
        """Run every line that has no result, until all have one or the batch or the server is stopped."""
        batch = running.batch
        done = await asyncio.to_thread(self.store.done_lines, batch.id)
        lines = self.store.lines(batch.input_file_id, self.context.config.max_body_bytes)
        ahead: deque[tuple[int, bytes]] = deque()
        most = max(16, 2 * self.parallel)  # lines in memory: read ahead, and put back for later
        looked = 0.0

        async def wanted() -> bool:
            nonlocal looked
            if self.context.gate.closing or time.time() >= batch.expires_at:
                return False
            if self.context.access.principal(batch.key_id) is None:
                await self._revoked(batch)
                return False
            if time.monotonic() - looked < LOOK_SECONDS:
                return True
            looked = time.monotonic()
            return (await self._fresh(batch)).status == "in_progress"

        try:
            while await wanted():
                if not ahead:
                    ahead.extend(await asyncio.to_thread(_take, lines, done, most))
                waiting = running.waiting
                if waiting and waiting[0][0] <= time.monotonic():
                    if await self._take_place(wanted):
                        self._launch(running, *heapq.heappop(waiting)[1:])
                elif ahead and len(waiting) < most:
                    if await self._take_place(wanted):
                        self._launch(running, *ahead.popleft())
                elif running.tasks or waiting:
                    await _pause(running)
                else:
                    break
        finally:
            if running.tasks:
                await asyncio.wait(running.tasks)

    def _launch(self, running: _Running, number: int, raw: bytes) -> None:
        """Start a line; its place is taken."""

        async def run() -> None:
            try:
                result = await self._line(running, number, raw)
            finally:
                self._leave_place()
            if result is not None:
                await self._write(running, result)

        task = asyncio.create_task(run())
        running.tasks.add(task)
        task.add_done_callback(running.tasks.discard)

    async def _line(self, running: _Running, number: int, raw: bytes) -> Result | None:
        """A line's result; None where it has to be tried again, or its key is revoked."""
        batch = running.batch
        principal = self.context.access.principal(batch.key_id)  # as it is now: priority, models
        if principal is None:
            await self._revoked(batch)
            return None
        line = orjson.loads(raw)
        custom_id = line["custom_id"]
        attempt = int(batch.attempts.get(str(number), 0))
        request_id = ""
        try:
            job = ENDPOINTS[batch.endpoint](orjson.dumps(line["body"]), self.context)
            job = line_job(job, batch.id, number, attempt)
            request_id = job.request_id or ""
            body = await run_job(self.context, principal, job, batch.endpoint)
        except Exception as error:
            shown = as_api_error(error)
            if shown.code in PASSING and not self._lasting(running, number, shown):
                await self._later(running, number, raw, shown)
                return None
            if shown.status >= 500 and not isinstance(error, ApiError | RequestError):
                _log.error("batch %s, line %d failed: %s", batch.id, number + 1, error, exc_info=error)
            answer = answer_line(batch.id, number, custom_id, shown.status, request_id, shown.body())
            return Result(number, False, answer)
        usage = orjson.loads(body).get("usage") or {}
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        answer = answer_line(batch.id, number, custom_id, 200, request_id, body)
        return Result(
            number, True, answer, usage.get("prompt_tokens", 0), cached, usage.get("completion_tokens", 0)
        )

    def _lasting(self, running: _Running, number: int, error: ApiError) -> bool:
        """Whether the engine has failed under a line too often to try it again."""
        failures = running.batch.engine_failures.get(str(number), 0)
        return error.code == "engine_unavailable" and failures >= MAX_ENGINE_FAILURES

    async def _later(self, running: _Running, number: int, raw: bytes, error: ApiError) -> None:
        """Put a line back, for its own time: other lines go on. One that was cut off by the server itself is
        a new attempt, with a new id."""
        if error.status == 503:
            batch = running.batch
            changes: dict[str, Any] = {"attempts": _one_more(batch.attempts, number)}
            if error.code == "engine_unavailable":
                changes["engine_failures"] = _one_more(batch.engine_failures, number)
            running.batch = replace(batch, **changes)
            await self._update(batch, ("in_progress", "cancelling"), **changes)
        seconds = float(error.headers.get("Retry-After", POLL_SECONDS))
        due = time.monotonic() + min(seconds, MAX_LATER_SECONDS)
        heapq.heappush(running.waiting, (due, number, raw))

    async def _write(self, running: _Running, result: Result) -> None:
        """Enter a result, together with those that came while others were written."""
        running.results.append(result)
        async with running.writing:
            while taken := list(running.results):
                try:
                    await asyncio.to_thread(self.store.add_results, running.batch.id, taken)
                except (sqlite3.Error, OSError) as error:
                    _log.error("batch %s: results can't be written: %s", running.batch.id, error)
                    if self.context.gate.closing:
                        return  # the next process runs these lines again
                    await asyncio.sleep(POLL_SECONDS)
                else:
                    del running.results[: len(taken)]
                    self.num_lines += len(taken)

    async def _give_up(self, batch: Batch, status: str) -> None:
        """An error line for every line that was not run."""
        if not batch.total:
            return  # it never came to be checked
        code, why = _UNRUN[status]
        done = await asyncio.to_thread(self.store.done_lines, batch.id)
        lines = self.store.lines(batch.input_file_id, self.context.config.max_body_bytes)
        while rest := await asyncio.to_thread(_take, lines, done, 256):
            results = []
            for number, raw in rest:
                custom_id = orjson.loads(raw)["custom_id"]
                error = {"code": code, "message": why}
                data = {
                    "id": line_id(batch.id, number),
                    "custom_id": custom_id,
                    "response": None,
                    "error": error,
                }
                results.append(Result(number, False, orjson.dumps(data)))
            await asyncio.to_thread(self.store.add_results, batch.id, results)


_UNRUN = {
    "expired": ("batch_expired", "this request was not run before the completion window ended"),
    "cancelled": ("batch_cancelled", "this request was not run before the batch was cancelled"),
}


def _outcome(batch: Batch) -> str | None:
    """The final state that a batch is to end in; None where lines have to be run yet."""
    if batch.outcome is not None:
        return batch.outcome
    if batch.status == "cancelling":
        return "cancelled"
    if batch.completed + batch.failed >= batch.total:
        return "completed"
    return "expired" if time.time() >= batch.expires_at else None


def _one_more(counts: Mapping[str, int], number: int) -> dict[str, int]:
    return {**counts, str(number): counts.get(str(number), 0) + 1}


async def _pause(running: _Running) -> None:
    """Until a line ends, one that waits is due, or it is time to look at the batch again."""
    seconds = LOOK_SECONDS
    if running.waiting:
        seconds = min(seconds, max(0.0, running.waiting[0][0] - time.monotonic()))
    if running.tasks:
        await asyncio.wait(running.tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    else:
        await asyncio.sleep(seconds)


def _take(lines: Iterator[tuple[int, bytes]], done: set[int], count: int) -> list[tuple[int, bytes]]:
    """The next lines without a result."""
    taken: list[tuple[int, bytes]] = []
    for number, raw in lines:
        if number not in done:
            taken.append((number, raw))
            if len(taken) == count:
                break
    return taken


# ---------------------------------------------------------------- lines


@dataclass(frozen=True)
class Lines:
    """What validation found."""

    total: int
    model: str | None
    errors: tuple[tuple[str, str, str | None, int | None], ...]


def check_lines(store: BatchStore, batch: Batch, max_bytes: int) -> Lines:
    """Read a batch's whole input once: every line a request to the batch's endpoint, every custom_id once."""
    errors: list[tuple[str, str, str | None, int | None]] = []
    seen: set[str] = set()
    total, model = 0, None
    for number, raw in store.lines(batch.input_file_id, max_bytes):
        total += 1
        if total > MAX_LINES:
            errors.append(("too_many_lines", f"a batch may have at most {MAX_LINES} lines", None, number))
            break
        if len(raw) > max_bytes:
            errors.append(("line_too_long", f"a line may have at most {max_bytes} bytes", None, number))
            break
        found = _line_error(raw, batch.endpoint, seen)
        if found is not None:
            errors.append((*found, number))
            if len(errors) == MAX_ERRORS:
                break
        elif model is None:
            named = orjson.loads(raw)["body"].get("model")
            model = named if isinstance(named, str) else None
    if not total:
        errors.append(("empty_file", "the file has no lines", None, None))
    return Lines(total, model, tuple(errors))


def _line_error(raw: bytes, endpoint: str, seen: set[str]) -> tuple[str, str, str | None] | None:
    """(code, message, param) of what is wrong with a line; its custom_id joins `seen`."""
    try:
        line = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        return "invalid_json_line", f"the line is not valid JSON: {error}", None
    if not isinstance(line, dict):
        return "invalid_json_line", "the line is not a JSON object", None
    unknown = next((name for name in line if name not in _LINE_FIELDS), None)
    if unknown is not None:
        return "unknown_parameter", f"unknown field: {unknown[:100]}", unknown[:100]
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        return (
            "invalid_custom_id",
            f"custom_id must be a string of 1 to {MAX_CUSTOM_ID} characters",
            "custom_id",
        )
    if custom_id in seen:
        return "duplicate_custom_id", f"custom_id {custom_id[:100]!r} is in the file twice", "custom_id"
    seen.add(custom_id)
    if line.get("method") != "POST":
        return "invalid_method", f"method must be POST: {str(line.get('method'))[:40]!r}", "method"
    if line.get("url") != endpoint:
        return "mismatched_url", f"url must be the batch's endpoint, {endpoint}", "url"
    body = line.get("body")
    if not isinstance(body, dict):
        return "invalid_body", "body must be a JSON object", "body"
    if body.get("stream") not in (None, False):
        return "invalid_body", "a line of a batch can't be streamed", "body.stream"
    return None


def line_id(batch_id: str, number: int) -> str:
    """The id of a line's answer; always the same."""
    return f"batch_req_{batch_id.removeprefix('batch_')}_{number}"


def line_job(job: Job, batch_id: str, number: int, attempt: int) -> Job:
    """A line's Job: batch priority, and everything that is else drawn by chance drawn from its name."""
    digest = hashlib.sha256(f"{batch_id}/{number}/{attempt}".encode()).digest()
    params = job.params
    if params.seed is None:
        params = replace(params, seed=int.from_bytes(digest[:8], "big"))
    options = replace(job.options, priority=max(job.options.priority, BATCH))
    request_id = REPLIES[job.dialect].id_prefix + digest.hex()[:32]
    return replace(job, params=params, options=options, request_id=request_id)


def answer_line(
    batch_id: str, number: int, custom_id: str, status: int, request_id: str, body: bytes
) -> bytes:
    """A line of the output or error file, without its end."""
    response = {"status_code": status, "request_id": request_id or line_id(batch_id, number)}
    head = orjson.dumps({"id": line_id(batch_id, number), "custom_id": custom_id})[:-1]
    return head + b',"response":' + orjson.dumps(response)[:-1] + b',"body":' + body + b'},"error":null}'
