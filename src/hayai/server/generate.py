"""Runs a Job and sends its answer; stops it when the client leaves or the server closes.

Headers go out with the first token, so that everything which can fail before it (an unknown model, a
prompt that is too long, a full queue) is an HTTP status and not an error inside a 200.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hayai.engine.request import SamplingParams
from hayai.frontend import Frontend, Prompt, TextChunk
from hayai.server.errors import as_api_error
from hayai.server.gate import Gate, shutting_down
from hayai.server.job import Job
from hayai.server.replies import Choice, Reply

_log = logging.getLogger("hayai.server")
_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Generation(Response):
    """A response that is made while it is sent: pure ASGI, one write per event."""

    def __init__(self, frontend: Frontend, job: Job, reply: Reply, request_id: str, gate: Gate) -> None:
        self.background = None
        self.status_code = 200
        self._frontend = frontend
        self._job = job
        self._reply = reply
        self._request_id = request_id
        self._gate = gate
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_choices = self._job.num_choices
        self._gate.check(num_choices)
        run = self._stream if self._job.stream else self._answer
        work = asyncio.create_task(run(send))
        watch = asyncio.create_task(_disconnect(receive))
        self._gate.enter(work, num_choices)
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            gone = watch.done() and not work.done()
        finally:
            work.cancel()
            watch.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)
            self._gate.leave(work, num_choices)
        if gone:
            return
        if work.cancelled():
            await self._fail(shutting_down(), send)
        elif (error := work.exception()) is not None:
            assert isinstance(error, Exception)
            await self._fail(error, send)

    async def _fail(self, error: Exception, send: Send) -> None:
        """An HTTP status before the first byte, an error event after it."""
        if not self._started:
            raise error
        shown = as_api_error(error)
        if shown.status >= 500 and shown is not error:
            _log.error("request %s failed: %s", self._request_id, error, exc_info=error)
        event = b"data: " + shown.body() + b"\n\n"
        await send({"type": "http.response.body", "body": event, "more_body": False})

    async def _stream(self, send: Send) -> None:
        reply = self._reply
        finished: list[Choice] = []
        async with aclosing(self._chunks()) as chunks:
            async for index, ready in chunks:
                event = b"".join([reply.event(index, chunk) for chunk in ready])  # an event each, one write
                if not self._started:
                    await self._start(send)
                    event = reply.opening() + event
                chunk = ready[-1]
                if chunk.finish_reason is not None:
                    _check_finished(chunk)
                    choice = Choice(index)
                    choice.add(chunk)
                    finished.append(choice)
                    if len(finished) == self._job.num_choices:
                        break
                if event:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        finished.sort(key=lambda c: c.index)
        body = event + reply.closing(finished)  # the last event shares its write with the end
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _start(self, send: Send) -> None:
        self._started = True
        headers = [*_SSE_HEADERS, (b"x-request-id", self._request_id.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _answer(self, send: Send) -> None:
        choices = [Choice(i) for i in range(self._job.num_choices)]
        async with aclosing(self._chunks()) as chunks:
            async for index, ready in chunks:
                for chunk in ready:
                    _check_finished(chunk)
                    choices[index].add(chunk)
        body = self._reply.whole(choices)
        self._started = True
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", self._request_id.encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _chunks(self) -> AsyncGenerator[tuple[int, list[TextChunk]], None]:
        """(choice, its next chunks) as they come. Closing it aborts what still runs."""
        prompts = await self._prompts()
        streams = [self._one(prompts[i // self._job.n], i) for i in range(self._job.num_choices)]
        if len(streams) == 1:
            async with aclosing(streams[0]) as stream:
                async for ready in stream:
                    yield 0, ready
            return
        async with aclosing(_merge(streams)) as merged:
            async for item in merged:
                yield item

    def _one(self, prompt: Prompt, index: int) -> AsyncGenerator[list[TextChunk], None]:
        params = _with_seed(self._job.params, index % self._job.n)
        request_id = f"{self._request_id}-{index}" if self._job.num_choices > 1 else self._request_id
        return self._frontend.stream_tokens(prompt, params, request_id)

    async def _prompts(self) -> Sequence[Prompt]:
        """The prompts; tokenised once where several choices continue each."""
        prompts = self._job.prompts
        if self._job.n == 1:
            return prompts  # the frontend does it
        encode = self._frontend.encode
        return [Prompt(token_ids=await asyncio.to_thread(encode, prompt)) for prompt in prompts]


def _with_seed(params: SamplingParams, choice: int) -> SamplingParams:
    """Choices of one prompt differ, and each can be had again: the seed moves on by one per choice."""
    if params.seed is None or choice == 0:
        return params
    return replace(params, seed=(params.seed + choice) % (1 << 64))


def _check_finished(chunk: TextChunk) -> None:
    """An answer that the engine gave up is not an answer."""
    if chunk.finish_reason == "abort":
        raise shutting_down()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _merge(
    streams: Sequence[AsyncGenerator[list[TextChunk], None]],
) -> AsyncGenerator[tuple[int, list[TextChunk]], None]:
    """Items of several streams in the order they come. The first error ends all of them."""
    queue: asyncio.Queue[tuple[int, list[TextChunk] | None, BaseException | None]] = asyncio.Queue()

    async def drain(index: int, stream: AsyncGenerator[list[TextChunk], None]) -> None:
        error: BaseException | None = None
        try:
            async with aclosing(stream):
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
