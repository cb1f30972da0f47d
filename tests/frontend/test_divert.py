"""A stream whose chunks go to a sink on the engine's thread: nothing lost, doubled or out of order."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import aclosing
from typing import Any

import pytest

from frontend_fakes import START, MakeFrontend
from hayai.engine.request import SamplingParams
from hayai.frontend import Frontend, Prompt, TextChunk

LONG = SamplingParams(temperature=0.0, max_tokens=120, ignore_eos=True)


class Sink:
    """Takes `room` chunks, then declines until it is opened again."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.left = 0
        self.chunks: list[TextChunk] = []
        self.threads: set[str] = set()
        self.opened = 0

    @property
    def writable(self) -> bool:
        return self.left > 0

    async def open(self) -> bool:
        self.opened += 1
        self.left = self.room
        return self.room > 0

    def send(self, chunk: TextChunk) -> None:
        self.left -= 1
        self.chunks.append(chunk)
        self.threads.add(threading.current_thread().name)


def slowed(make_frontend: MakeFrontend) -> Frontend:
    """A model that takes its time, as real ones do: the loop gets its turns in between."""
    frontend, runner = make_frontend()
    step = runner.step

    def slow(*args: Any, **kw: Any) -> Any:
        time.sleep(2e-4)
        return step(*args, **kw)

    runner.step = slow  # type: ignore[method-assign]
    return frontend


async def both(
    frontend: Frontend, sink: Sink, params: SamplingParams = LONG, prompt: Prompt = START
) -> list[TextChunk]:
    """All chunks in the order of a client: what the sink took comes before what the iterator gives next."""
    seen: list[TextChunk] = []
    async with aclosing(frontend.stream_tokens(prompt, params, direct=sink)) as parts:
        async for chunks in parts:
            seen += sink.chunks
            sink.chunks.clear()
            seen += chunks
    assert not sink.chunks, "the last chunk is the iterator's"
    return seen


def content(chunks: list[TextChunk]) -> list[tuple[str, tuple[int, ...], str | None]]:
    return [(c.text, c.token_ids, c.finish_reason) for c in chunks]


@pytest.mark.parametrize("room", [0, 1, 3, 1000])
async def test_the_same_chunks_in_the_same_order(make_frontend: MakeFrontend, room: int) -> None:
    frontend = slowed(make_frontend)
    expected = list(frontend.iterate(START, LONG))
    for _ in range(8):
        sink = Sink(room)
        assert content(await both(frontend, sink)) == content(expected)
        assert sink.threads == ({"hayai-engine"} if room else set())
        assert sink.opened >= 1


async def test_one_stream_at_a_time(make_frontend: MakeFrontend) -> None:
    frontend = slowed(make_frontend)
    expected = content(list(frontend.iterate(START, LONG)))
    sinks = [Sink(1000) for _ in range(3)]
    seen = await asyncio.gather(*(both(frontend, sink) for sink in sinks))
    assert all(content(chunks) == expected for chunks in seen)
    assert content(await both(frontend, Sink(1000))) == expected, "the place is free again"


async def test_a_stop_string_keeps_the_stream_on_the_loop(make_frontend: MakeFrontend) -> None:
    frontend = slowed(make_frontend)
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, stop=("\x00never",))
    sink = Sink(1000)
    chunks = await both(frontend, sink, params)
    assert sink.opened == 0 and not sink.threads
    assert "".join(c.text for c in chunks) == frontend.generate([START], params)[0].text


async def test_leaving_stops_the_sink(make_frontend: MakeFrontend) -> None:
    frontend = slowed(make_frontend)
    sink = Sink(1 << 30)
    params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    async with aclosing(frontend.stream_tokens(START, params, direct=sink)) as parts:
        await anext(parts)
        waiting = asyncio.ensure_future(anext(parts))
        while not sink.chunks and not waiting.done():
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    taken = len(sink.chunks)
    await asyncio.sleep(0.05)
    assert len(sink.chunks) == taken
    assert content(await both(frontend, Sink(5)))[-1][2] == "length"
