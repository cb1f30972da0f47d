"""Events straight from the engine's thread to the socket, past the event loop.

A token of a stream costs the loop a wake-up, a turn of its tasks and a write, on a core that computes the
next token at that time: a tenth of the speed of a lone stream (docs/log.md). While a stream has the server
to itself, its events are written by the thread that has just made them: one system call, no switch between
threads. Whatever is not a plain event in a socket with room (the first and the last event, a full buffer,
TLS) goes the ordinary way.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic

from hayai.frontend import TextChunk

TRANSPORT = "hayai.transport"
"""The extension of the ASGI scope by which run.py names a connection's transport ('transport'). 'direct':
whether events may go past the ASGI application; left out, they may."""


class DirectStream:
    """Chunks of one chunked HTTP/1.1 answer, written from another thread than the loop's.

    `send` runs on the engine's thread and only between a successful `open` and `close` (the
    frontend sees to that); everything else runs on the loop's. The socket is duplicated while it is open
    here: the number of a closed one may belong to another client by now.
    """

    def __init__(self, transport: asyncio.WriteTransport, encode: Callable[[TextChunk], bytes]) -> None:
        self._transport = transport
        self._encode = encode
        self._fd = -1
        self._loop: asyncio.AbstractEventLoop | None = None
        self._rest = b""
        self._writes: list[tuple[float, int]] = []
        self._lock = threading.Lock()  # who writes: this class, or the loop through the transport
        self.writable = False
        """Whether `send` writes; if not, the loop is to be asked for all that follows."""

    async def open(self) -> bool:
        """Whether `send` may be used from now on: nothing waits to be written, and nothing encrypts."""
        transport = self._transport
        if self._rest or transport.get_extra_info("ssl_object") is not None:
            return False
        for _ in range(3):  # what was written in this turn of the loop goes out at its end
            if transport.get_write_buffer_size() == 0:
                break
            await asyncio.sleep(0)
        else:
            return False
        if transport.is_closing():
            return False
        if self._fd < 0:
            self._fd = os.dup(transport.get_extra_info("socket").fileno())
            self._loop = asyncio.get_running_loop()
        self.writable = True
        return True

    def send(self, chunk: TextChunk) -> None:
        """Write the event of a chunk; what the socket doesn't take waits for `stop`."""
        self._writes.append((monotonic(), len(chunk.token_ids)))
        event = self._encode(chunk)
        if not event:
            return
        frame = b"%x\r\n%b\r\n" % (len(event), event)
        with self._lock:
            written = self._write(frame) if self.writable else 0
            if written < len(frame):
                self._rest += frame[written:]
                self.writable = False

    def _write(self, frame: bytes) -> int:
        try:
            return os.write(self._fd, frame)
        except BlockingIOError:
            return 0
        except OSError:
            self._lose()
            return len(frame)

    def _lose(self) -> None:
        """The client is gone. The loop would see that only where it reads from the socket."""
        assert self._loop is not None
        self.writable = False
        with suppress(RuntimeError):  # the loop is closed, and its connections with it
            self._loop.call_soon_threadsafe(self._transport.abort)

    def take_writes(self) -> list[tuple[float, int]]:
        """(monotonic seconds, tokens) of each chunk sent since the last call, also while more are sent."""
        writes = self._writes
        taken = writes[: len(writes)]
        del writes[: len(taken)]
        return taken

    def stop(self) -> None:
        """The loop writes from now on, until the next `open`; what the socket did not take goes first."""
        with self._lock:
            self.writable = False
            rest, self._rest = self._rest, b""
        if rest and not self._transport.is_closing():
            self._transport.write(rest)

    def close(self) -> None:
        """No `send` comes any more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
