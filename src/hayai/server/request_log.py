"""A file with every prompt and answer, one JSON object per line, for operators who asked for it.

Nothing else keeps what is said: the server's own log has ids, counts and errors only.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hayai.errors import ConfigError
from hayai.server.direct import TRANSPORT

MAX_LOGGED_BYTES = 4 << 20
"""Of a body; the rest is left out, and the line says so."""


class RequestLog:
    """ASGI middleware that writes a line per POST request once it is over: time, path, status, request_id,
    and both bodies, JSON as JSON and event streams as text. Only its owner may read the file."""

    def __init__(self, app: ASGIApp, path: Path) -> None:
        self._app = app
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(f"can't write the log of requests {path}: {error.strerror}") from None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        extensions = dict(scope.get("extensions") or {})
        if TRANSPORT in extensions:  # events must pass here: no short cut from the engine to the socket
            extensions[TRANSPORT] = {**extensions[TRANSPORT], "direct": False}
        began = time.time()
        asked, answered = _Body(), _Body()
        line: dict[str, Any] = {"time": began, "path": scope["path"], "status": None, "request_id": None}

        async def receiving() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                asked.add(message.get("body", b""))
            return message

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = {name.lower(): value for name, value in message["headers"]}
                line["status"] = message["status"]
                line["request_id"] = headers.get(b"x-request-id", b"").decode("latin-1") or None
            elif message["type"] == "http.response.body":
                answered.add(message.get("body", b""))
            await send(message)

        try:
            await self._app({**scope, "extensions": extensions}, receiving, sending)
        finally:
            line |= {"seconds": time.time() - began, "request": asked.value(), "response": answered.value()}
            os.write(self._fd, orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))


class _Body:
    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, part: bytes) -> None:
        if self._size <= MAX_LOGGED_BYTES:
            self._parts.append(part)
        self._size += len(part)

    def value(self) -> Any:
        """The body as JSON where it is that, else as text."""
        body = b"".join(self._parts)
        if self._size > MAX_LOGGED_BYTES:
            return body[:MAX_LOGGED_BYTES].decode("utf-8", "replace") + f" ... ({self._size} bytes)"
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError:
            return body.decode("utf-8", "replace")
