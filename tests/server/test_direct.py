"""Events written by the engine's thread: whole frames in order, full sockets, clients that leave."""

from __future__ import annotations

import asyncio
import socket

from hayai.frontend import TextChunk
from hayai.server.direct import DirectStream


def encode(chunk: TextChunk) -> bytes:
    return chunk.text.encode()


async def connect() -> tuple[asyncio.Transport, socket.socket]:
    """A transport as the server has it, and the client's end with small buffers."""
    near, far = socket.socketpair()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    far.settimeout(5)
    transport, _ = await asyncio.get_running_loop().connect_accepted_socket(asyncio.Protocol, near)
    return transport, far


def receive(far: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = far.recv(size - len(data))
        assert part, f"closed after {len(data)} of {size} bytes"
        data += part
    return data


async def test_frames_follow_what_the_loop_wrote() -> None:
    transport, far = await connect()
    direct = DirectStream(transport, encode)
    transport.write(b"head|")
    assert await direct.open()
    await asyncio.to_thread(direct.send, TextChunk("one", (1,)))
    await asyncio.to_thread(direct.send, TextChunk("", (2,)))  # half a character: no event
    await asyncio.to_thread(direct.send, TextChunk("four!", (3, 4)))
    direct.stop()
    transport.write(b"|tail")
    expected = b"head|3\r\none\r\n5\r\nfour!\r\n|tail"
    assert await asyncio.to_thread(receive, far, len(expected)) == expected
    writes = direct.take_writes()
    assert [tokens for _, tokens in writes] == [1, 1, 2]
    assert writes == sorted(writes) and direct.take_writes() == []
    direct.close()
    transport.close()
    far.close()


async def test_what_a_full_socket_refuses_is_not_lost_and_not_doubled() -> None:
    transport, far = await connect()
    direct = DirectStream(transport, encode)
    assert await direct.open()
    sent = b""
    number = 0
    while direct.writable:
        text = f"{number:06d}" * 200
        direct.send(TextChunk(text, (number,)))
        sent += b"%x\r\n%b\r\n" % (len(text), text.encode())
        number += 1
    direct.send(TextChunk("late", (number,)))
    sent += b"4\r\nlate\r\n"
    assert not await direct.open(), "an event is not whole yet"
    direct.stop()
    transport.write(b"end")
    assert await asyncio.to_thread(receive, far, len(sent) + 3) == sent + b"end"
    direct.close()
    transport.close()
    far.close()


async def test_refuses_while_the_loop_has_bytes_to_write() -> None:
    transport, far = await connect()
    direct = DirectStream(transport, encode)
    transport.write(b"x" * (1 << 22))
    assert transport.get_write_buffer_size() > 0
    assert not await direct.open()
    far.close()
    transport.abort()


async def test_a_client_that_left_costs_nothing() -> None:
    transport, far = await connect()
    direct = DirectStream(transport, encode)
    assert await direct.open()
    far.close()
    for _ in range(3):
        direct.send(TextChunk("text", (1,)))
    assert not direct.writable, "the loop is asked for what follows"
    await asyncio.sleep(0)
    assert transport.is_closing()
    direct.stop()
    direct.close()
    direct.close()
    assert not await direct.open()
