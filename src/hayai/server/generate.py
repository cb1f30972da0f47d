"""Runs a Job and sends its answer; stops it when the client leaves or the server closes.

Headers go out with the first token, so that everything which can fail before it (an unknown model, a
prompt that is too long, a full queue) is an HTTP status and not an error inside a 200.

Slow readers: a write waits until the socket takes it. Meanwhile the engine goes on, so that its KV blocks
come free, and the rest of the answer waits as text, which max_tokens and the context bound. A reader that
takes nothing for `STALL_SECONDS` has left.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hayai.engine.request import SamplingParams
from hayai.frontend import Prompt, TextChunk, Usage
from hayai.server.access import Ticket
from hayai.server.context import ServerContext
from hayai.server.direct import TRANSPORT, DirectStream
from hayai.server.errors import ApiError, as_api_error
from hayai.server.gate import shutting_down
from hayai.server.job import Job
from hayai.server.metrics import RequestMeter
from hayai.server.reply import Choice, Reply, ReplyHead, totals

_log = logging.getLogger("hayai.server")
_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

PING_SECONDS = 15.0
"""A stream that is silent for so long gets a ping: proxies cut connections on which nothing moves."""
STALL_SECONDS = 60.0
"""A reader that takes nothing for so long has left."""


class Generation(Response):
    """A response that is made while it is sent: pure ASGI, one write per event.

    It owns the request's ticket and meter, and settles both exactly once however it ends: with the tokens
    that were handed to the client, and 'ok', 'cancelled' (the client left), 'timeout' (its deadline passed),
    'aborted' (the server closed) or 'error'.
    """

    def __init__(
        self,
        context: ServerContext,
        job: Job,
        reply: Reply,
        head: ReplyHead,
        ticket: Ticket,
        meter: RequestMeter,
        arrived: float,
        in_background: bool = False,
    ) -> None:
        self.background = None
        self._in_background = in_background
        self.status_code = 200
        self._context = context
        self._frontend = context.frontend
        self._gate = context.gate
        self._job = job
        self._reply = reply
        self._head = head
        self._ticket = ticket
        self._meter = meter
        self._arrived = arrived
        self._started = False
        self._transport: asyncio.WriteTransport | None = None
        self._direct: DirectStream | None = None
        self._options = job.options
        self._warnings = list(job.warnings)
        self._finished: list[Choice] = []
        self._num_tokens = 0
        self._body = b""
        self._sending_since = 0.0  # loop time at which the write that is under way began; 0: none is
        self._last_sent = 0.0

    # ------------------------------------------------------------------ life

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = Headers(scope=scope)
            self._meter.traceparent = headers.get("traceparent")
            deadline = self._gate.deadline(headers, self._arrived)
            if deadline is not None:
                self._options = replace(self._options, deadline=deadline)
            connection = (scope.get("extensions") or {}).get(TRANSPORT, {})
            self._transport = connection.get("transport")
            if connection.get("direct", True):
                self._direct = self._direct_stream(scope)
            await self._serve(receive, send)
        except Exception as error:
            self._settled(error)
            raise
        finally:
            self._settle("cancelled")
            if self._direct is not None:
                self._direct.close()

    async def body_bytes(self) -> bytes:
        """The whole answer without a socket. ApiError and RequestError as a client would get them."""
        num_choices = self._job.num_choices
        try:
            self._gate.check(num_choices, self._in_background, self._options.tenant)
            work = asyncio.create_task(self._collect())
            self._gate.enter(work, num_choices, self._in_background, self._options.tenant)
            try:
                await work
            except asyncio.CancelledError:
                if self._gate.closing:
                    raise self._settled(shutting_down()) from None
                raise
            except Exception as error:
                raise self._settled(error) from None
            finally:
                work.cancel()
                self._gate.leave(work, num_choices)
            self._settle("ok")
            await self._ticket.flushed()
            return self._body
        finally:
            self._settle("cancelled")

    async def _serve(self, receive: Receive, send: Send) -> None:
        num_choices = self._job.num_choices
        tenant = self._options.tenant
        self._gate.check(num_choices, tenant=tenant)  # others may have come in while the prompt was tokenised
        run = self._stream if self._job.stream else self._answer
        work = asyncio.create_task(run(send))
        watch = asyncio.create_task(_disconnect(receive))
        awake = asyncio.create_task(self._keep_awake(send)) if self._job.stream else watch
        self._gate.enter(work, num_choices, tenant=tenant)
        try:
            await asyncio.wait((work, watch, awake), return_when=asyncio.FIRST_COMPLETED)
            gone = not work.done()
        finally:
            for task in (work, watch, awake):
                task.cancel()
            await asyncio.gather(work, watch, awake, return_exceptions=True)
            self._gate.leave(work, num_choices)
        if self._transport is not None:
            _abort_if_stalled(self._transport)
        if gone:
            if watch.cancelled() and self._transport is not None:
                self._transport.abort()  # it stopped reading, so it would not read an end either
                await _disconnect(receive)
            return
        if work.cancelled():
            await self._fail(shutting_down(), send)
        elif (error := work.exception()) is not None:
            assert isinstance(error, Exception)
            await self._fail(error, send)

    async def _fail(self, error: Exception, send: Send) -> None:
        """An HTTP status before the first byte, an error event after it."""
        self._settled(error)
        if not self._started:
            raise error
        self._leave_direct()
        shown = as_api_error(error)
        if shown.status >= 500 and shown is not error:
            _log.error("request %s failed: %s", self._head.request_id, error, exc_info=error)
        await send({"type": "http.response.body", "body": self._reply.error(shown), "more_body": False})

    def _settled(self, error: Exception) -> Exception:
        self._settle(_STATUSES.get(as_api_error(error).code or "", "error"))
        return error

    def _direct_stream(self, scope: Scope) -> DirectStream | None:
        """The way past the event loop, where the answer is one stream of chunks on a plain connection."""
        plain = self._job.stream and self._job.num_choices == 1 and scope.get("http_version") == "1.1"
        if not plain or self._transport is None:
            return None
        return DirectStream(self._transport, partial(self._reply.event, 0))

    def _leave_direct(self) -> None:
        """Before the loop writes: nothing goes past it any more."""
        if self._direct is not None:
            self._direct.stop()
            self._count_direct()

    def _count_direct(self) -> None:
        """Enter what the engine's thread has written since the last time."""
        if self._direct is not None:
            for at, num_tokens in self._direct.take_writes():
                self._num_tokens += num_tokens
                self._meter.tokens(num_tokens, 0, at)

    def _settle(self, status: str) -> None:
        """Report what was used; the first call counts."""
        self._count_direct()
        if len(self._finished) == self._job.num_choices:
            usage = totals(self._job, self._finished)
        else:  # a prompt counts once its first token has come
            prompt_tokens = self._head.prompt_tokens if self._num_tokens else 0
            usage = Usage(prompt_tokens, self._num_tokens)
        timing = self._finished[0].timing if self._finished else None
        self._meter.finished(status, usage, timing)
        first = self._meter.first
        self._ticket.settle(
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.completion_tokens,
            status,
            1e3 * (first - self._arrived) if first else None,
        )

    # ------------------------------------------------------------------ streamed

    async def _stream(self, send: Send) -> None:
        reply, meter = self._reply, self._meter
        loop = asyncio.get_running_loop()
        finished = self._finished
        event = b""
        async with aclosing(self._chunks()) as chunks:
            async for index, ready in chunks:
                self._leave_direct()
                event = b"".join([reply.event(index, chunk) for chunk in ready])  # an event each, one write
                num_tokens = sum([len(chunk.token_ids) for chunk in ready])
                self._num_tokens += num_tokens
                meter.tokens(num_tokens)
                if not self._started:
                    await self._start(send)
                    event = reply.opening() + event
                chunk = ready[-1]
                if chunk.finish_reason is not None:
                    _check_finished(chunk)
                    choice = Choice(index)
                    choice.end(chunk)
                    finished.append(choice)
                    if len(finished) == self._job.num_choices:
                        break
                if event:
                    self._sending_since = loop.time()
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                    self._last_sent, self._sending_since = self._sending_since, 0.0
        finished.sort(key=lambda c: c.index)
        await reply.keep(finished)
        self._settle("ok")
        await self._ticket.flushed()
        body = event + reply.closing(finished)  # the last event shares its write with the end
        self._sending_since = loop.time()
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _start(self, send: Send) -> None:
        self._started = True
        await send({"type": "http.response.start", "status": 200, "headers": self._head_lines(_SSE_HEADERS)})

    async def _keep_awake(self, send: Send) -> None:
        """Ping a stream that is silent; return when the reader has taken nothing for too long."""
        loop = asyncio.get_running_loop()
        self._last_sent = loop.time()
        while True:
            await asyncio.sleep(PING_SECONDS)
            now = loop.time()
            before = self._num_tokens
            self._count_direct()
            if self._num_tokens > before:
                self._last_sent = now
            if self._sending_since:
                if now - self._sending_since >= STALL_SECONDS:
                    return
            elif now - self._last_sent >= PING_SECONDS:
                await self._ping(send)

    async def _ping(self, send: Send) -> None:
        """A silent stream says that it lives, from now on with a status of 200 even if it fails."""
        loop = asyncio.get_running_loop()
        self._leave_direct()
        self._sending_since = loop.time()
        body = self._reply.ping
        if not self._started:
            await self._start(send)
            body = self._reply.opening() + body
        await send({"type": "http.response.body", "body": body, "more_body": True})
        self._last_sent, self._sending_since = loop.time(), 0.0

    # ------------------------------------------------------------------ whole

    async def _answer(self, send: Send) -> None:
        await self._collect()
        self._settle("ok")
        await self._ticket.flushed()
        self._started = True
        headers = self._head_lines(
            [(b"content-type", b"application/json"), (b"content-length", str(len(self._body)).encode())]
        )
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self._body, "more_body": False})

    async def _collect(self) -> None:
        """Run it all and keep the whole body."""
        choices = [Choice(i) for i in range(self._job.num_choices)]
        async with aclosing(self._chunks()) as chunks:
            async for index, ready in chunks:
                num_tokens = 0
                for chunk in ready:
                    _check_finished(chunk)
                    choices[index].add(chunk)
                    num_tokens += len(chunk.token_ids)
                self._num_tokens += num_tokens
                self._meter.tokens(num_tokens)
        self._finished = choices
        await self._reply.keep(choices)
        self._body = self._reply.whole(choices)

    def _head_lines(self, first: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        request_id = self._head.request_id.encode()
        headers = [*first, *((name, request_id) for name in self._reply.id_headers)]
        headers += [(k.encode(), v.encode()) for k, v in self._ticket.headers.items()]
        headers += [(b"x-hayai-warning", w.encode("ascii", "replace")) for w in self._warnings]
        return headers

    # ------------------------------------------------------------------ chunks

    async def _chunks(self) -> AsyncGenerator[tuple[int, list[TextChunk]], None]:
        """(choice, its next chunks) as they come. Closing it aborts what still runs."""
        streams = [self._one(i) for i in range(self._job.num_choices)]
        if len(streams) == 1:
            async with aclosing(streams[0]) as stream:
                async for ready in stream:
                    yield 0, ready
            return
        async with aclosing(_merge(streams, self._gate.max_running)) as merged:
            async for item in merged:
                yield item

    def _one(self, index: int) -> AsyncGenerator[list[TextChunk], None]:
        job, request_id = self._job, self._head.request_id
        prompt = Prompt(token_ids=self._head.prompts[index // job.n])
        params = _with_seed(job.params, index % job.n)
        if job.num_choices > 1:
            request_id = f"{request_id}-{index}"
        return self._frontend.stream_tokens(
            prompt, params, request_id, self._arrived, self._options, self._warnings, self._direct
        )


_STATUSES = {"shutting_down": "aborted", "deadline_exceeded": "timeout"}


def _with_seed(params: SamplingParams, choice: int) -> SamplingParams:
    """Choices of one prompt differ, and each can be had again: the seed moves on by one per choice."""
    if params.seed is None or choice == 0:
        return params
    return replace(params, seed=(params.seed + choice) % (1 << 64))


def _check_finished(chunk: TextChunk) -> None:
    """An answer that the engine gave up is not an answer."""
    if chunk.finish_reason == "abort":
        raise shutting_down()
    if chunk.finish_reason == "timeout":
        raise ApiError(504, "the request's deadline passed before it was done", code="deadline_exceeded")


def _abort_if_stalled(transport: asyncio.WriteTransport, left_before: int | None = None) -> None:
    """Close a connection on which the rest of an answer has not moved for `STALL_SECONDS`: what waits in its
    buffer would wait for ever."""
    left = transport.get_write_buffer_size()
    if left == 0 or transport.is_closing():
        return
    if left == left_before:
        transport.abort()
        return
    asyncio.get_running_loop().call_later(STALL_SECONDS, _abort_if_stalled, transport, left)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _merge(
    streams: Sequence[AsyncGenerator[list[TextChunk], None]], max_running: int
) -> AsyncGenerator[tuple[int, list[TextChunk]], None]:
    """Items of several streams in the order they come. The first error ends all of them.

    At most `max_running` have begun and not ended: more could not run, and would have their turns before what
    others ask meanwhile.
    """
    places = asyncio.Semaphore(max_running)
    queue: asyncio.Queue[tuple[int, list[TextChunk] | None, BaseException | None]] = asyncio.Queue()

    async def drain(index: int, stream: AsyncGenerator[list[TextChunk], None]) -> None:
        error: BaseException | None = None
        try:
            async with places, aclosing(stream):
                async for ready in stream:
                    queue.put_nowait((index, ready, None))
        except Exception as e:
            error = e
        queue.put_nowait((index, None, error))

    tasks = [asyncio.create_task(drain(i, s)) for i, s in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            index, ready, error = await queue.get()
            if error is not None:
                raise error
            if ready is None:
                running -= 1
            else:
                yield index, ready
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
