"""OpenAI's files: upload, list, look at, read, delete. What batches read their lines from and write them to.

An upload goes from the socket to the disk as it comes: a file of any size costs a few kilobytes of memory. It
is a file once its last byte is on the disk (batch_store.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Route

from hayai.server.batch_store import BatchStore, StorageFull, StoredFile
from hayai.server.context import ServerContext
from hayai.server.errors import ApiError
from hayai.server.openai_routes import json_response
from hayai.server.schema import takes_form, takes_query

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartParser

PURPOSES = ("batch",)
MAX_FILE_BYTES = 200 << 20
"""OpenAI's limit of a batch's input."""
MAX_TENANT_BYTES = 4 << 30
MAX_TENANT_FILES = 10_000
MAX_FIELD_BYTES = 1024
MAX_PARTS = 8
MAX_PAGE = 10_000
EXPIRES_RANGE = (3600, 30 * 86_400)
"""Seconds that `expires_after` may ask for: OpenAI's range."""

# The form parser warns of every bad form; its error, which the client gets, says the same.
logging.getLogger("python_multipart").addHandler(logging.NullHandler())

FORM_SCHEMA = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"enum": list(PURPOSES)},
        "expires_after[anchor]": {"const": "created_at"},
        "expires_after[seconds]": {
            "type": "integer",
            "minimum": EXPIRES_RANGE[0],
            "maximum": EXPIRES_RANGE[1],
        },
    },
    "required": ["file", "purpose"],
}


def routes(context: ServerContext, store: BatchStore) -> list[BaseRoute]:
    """The routes of this surface."""
    files = _Files(context, store)
    return [
        Route("/v1/files", files.upload, methods=["POST"]),
        Route("/v1/files", files.list),
        Route("/v1/files/{file_id}", files.card),
        Route("/v1/files/{file_id}", files.delete, methods=["DELETE"]),
        Route("/v1/files/{file_id}/content", files.content),
    ]


class _Files:
    def __init__(self, context: ServerContext, store: BatchStore) -> None:
        self.context = context
        self.store = store

    @takes_form(FORM_SCHEMA)
    async def upload(self, request: Request) -> Response:
        """Store a file (multipart/form-data: file, purpose)."""
        principal = self.context.access.authenticate(request.headers)
        refuse_other_sites(request)
        store = self.store
        number, size = await asyncio.to_thread(store.usage, principal.tenant)
        if number >= MAX_TENANT_FILES or size >= MAX_TENANT_BYTES:
            raise _storage_full(number, size)
        file_id, path = store.new_content()
        try:
            form = await _receive(request, path)
            now = int(time.time())
            file = StoredFile(
                file_id, principal.tenant, form.purpose, form.filename, form.size, now, form.expires_at(now)
            )
            await asyncio.to_thread(store.add_file, file, MAX_TENANT_FILES, MAX_TENANT_BYTES)
        except StorageFull as full:
            raise _storage_full(full.number, full.size) from None
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return json_response(file_card(file))

    @takes_query(
        limit={"type": "integer", "minimum": 1, "maximum": MAX_PAGE},
        after={"type": "string"},
        order={"enum": ["asc", "desc"]},
        purpose={"type": "string"},
    )
    async def list(self, request: Request) -> Response:
        """The caller's files, newest first (limit, order, after, purpose)."""
        principal = self.context.access.authenticate(request.headers)
        page = Page.read(request, MAX_PAGE, MAX_PAGE, ("purpose",))
        if page.after is not None:
            await self._find(principal.tenant, page.after)
        files = await asyncio.to_thread(
            self.store.files,
            principal.tenant,
            page.limit + 1,
            page.after,
            request.query_params.get("purpose"),
            page.newest_first,
        )
        return json_response(page.answer([file_card(file) for file in files]))

    async def card(self, request: Request) -> Response:
        """One file's card."""
        principal = self.context.access.authenticate(request.headers)
        return json_response(file_card(await self._find(principal.tenant, request.path_params["file_id"])))

    async def content(self, request: Request) -> Response:
        """A file's bytes."""
        principal = self.context.access.authenticate(request.headers)
        file = await self._find(principal.tenant, request.path_params["file_id"])
        return FileResponse(self.store.content_path(file.id), media_type="application/octet-stream")

    async def delete(self, request: Request) -> Response:
        """Delete a file; refused while a batch that is not over reads it."""
        principal = self.context.access.authenticate(request.headers)
        file = await self._find(principal.tenant, request.path_params["file_id"])
        for batch in await asyncio.to_thread(self.store.unfinished):
            if batch.input_file_id == file.id:
                message = f"{batch.id} still reads {file.id}; cancel it first"
                raise ApiError(409, message, param="file_id", code="file_in_use")
        await asyncio.to_thread(self.store.delete_file, file.id)
        return json_response({"id": file.id, "object": "file", "deleted": True})

    async def _find(self, tenant: str, file_id: str) -> StoredFile:
        return await find_file(self.store, tenant, file_id)


async def find_file(store: BatchStore, tenant: str, file_id: str, param: str = "file_id") -> StoredFile:
    """A tenant's file, or ApiError 404: another tenant's file does not exist."""
    file = await asyncio.to_thread(store.file, tenant, file_id)
    if file is None:
        raise ApiError(404, f"no such file: {file_id[:100]!r}", param=param, code="file_not_found")
    return file


def file_card(file: StoredFile) -> dict[str, Any]:
    """OpenAI's File object."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def refuse_other_sites(request: Request) -> None:
    """ApiError 403 for what a page of another site sends: browsers let it post forms without asking."""
    if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise ApiError(403, "pages of other sites may not send files here", code="cross_site")


# ---------------------------------------------------------------- lists


@dataclass(frozen=True)
class Page:
    """Which part of a list is asked for."""

    limit: int
    after: str | None
    newest_first: bool = True

    @classmethod
    def read(cls, request: Request, default: int, most: int, more: tuple[str, ...] = ()) -> Page:
        """From the query: limit, after, order. ApiError 400 for anything else but the names in `more`."""
        query = request.query_params
        known = ("limit", "after", "order", "api-version", *more)
        unknown = next((name for name in query if name not in known), None)
        if unknown is not None:
            raise _bad(unknown[:100], f"unknown query parameter: {unknown[:100]}", "unknown_parameter")
        limit = query.get("limit", str(default))
        if not (limit.isascii() and limit.isdigit() and len(limit) < 10 and 1 <= int(limit) <= most):
            raise _bad("limit", f"limit must be from 1 to {most}: {limit[:40]!r}")
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise _bad("order", f"order must be asc or desc: {order[:40]!r}")
        return cls(int(limit), query.get("after"), order == "desc")

    def answer(self, cards: list[dict[str, Any]]) -> dict[str, Any]:
        """OpenAI's list of up to `limit` cards; one more was looked up to know whether there are more."""
        shown = cards[: self.limit]
        return {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": len(cards) > len(shown),
        }


def _bad(param: str, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


# ---------------------------------------------------------------- uploads


@dataclass
class Form:
    """An upload's fields; the file itself is on the disk."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str = ""
    size: int = -1

    @property
    def purpose(self) -> str:
        return self.fields["purpose"]

    def check(self) -> None:
        """ApiError 400 for what is missing or not served."""
        if self.size < 0:
            raise _bad("file", "file is required", "missing_required_parameter")
        if self.size == 0:
            raise _bad("file", "the file is empty")
        purpose = self.fields.get("purpose")
        if purpose is None:
            raise _bad("purpose", "purpose is required", "missing_required_parameter")
        if purpose not in PURPOSES:
            raise _bad("purpose", f"purpose must be {' or '.join(PURPOSES)}: {purpose[:40]!r}")
        known = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
        unknown = next((name for name in self.fields if name not in known), None)
        if unknown is not None:
            raise _bad(unknown[:100], f"unknown field: {unknown[:100]}", "unknown_parameter")
        self.expires_at(0)

    def expires_at(self, now: int) -> int | None:
        anchor = self.fields.get("expires_after[anchor]")
        seconds = self.fields.get("expires_after[seconds]")
        if anchor is None and seconds is None:
            return None
        if anchor != "created_at":
            raise _bad("expires_after.anchor", f"expires_after.anchor must be created_at: {anchor!r:.40}")
        low, high = EXPIRES_RANGE
        plain = seconds is not None and seconds.isascii() and seconds.isdigit() and len(seconds) < 10
        number = int(seconds) if seconds is not None and plain else -1
        if not low <= number <= high:
            raise _bad("expires_after.seconds", f"expires_after.seconds must be from {low} to {high}")
        return now + number


async def _receive(request: Request, path: Path) -> Form:
    """Read a form from the socket, its file into `path`. ApiError 400, 413 or 415."""
    from python_multipart.exceptions import FormParserError  # 15 ms, needed for uploads only
    from python_multipart.multipart import parse_options_header

    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= 200:
        message = "Content-Type must be multipart/form-data with a boundary"
        raise ApiError(415, message, code="unsupported_media_type")
    limit = MAX_FILE_BYTES + MAX_PARTS * (MAX_FIELD_BYTES + 8192)
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:18]) > limit:
        raise _too_large()
    with open(path, "wb") as out:
        reader = _FormReader(out, boundary)
        try:
            async for part in request.stream():
                reader.parser.write(part)
            reader.parser.finalize()
        except ClientDisconnect:
            raise ApiError(400, "the client left in its upload", code="disconnected") from None
        except FormParserError as error:
            raise _bad("file", f"the form can't be read: {error}", "invalid_multipart") from None
    if not reader.complete:
        raise _bad("file", "the form ends in the middle", "invalid_multipart")
    reader.form.check()
    return reader.form


def _storage_full(number: int, size: int) -> ApiError:
    message = f"the storage is full: {number} files, {size} bytes; delete what is not needed"
    return ApiError(413, message, code="storage_full")


def _too_large() -> ApiError:
    message = f"a file may have at most {MAX_FILE_BYTES} bytes"
    return ApiError(413, message, param="file", code="file_too_large", headers={"Connection": "close"})


class _FormReader:
    """What the parser calls: sorts parts into fields and the one file."""

    def __init__(self, out: BinaryIO, boundary: bytes) -> None:
        from python_multipart.multipart import MultipartParser  # as in `_receive`

        self.form = Form()
        self.complete = False
        self._out = out
        self._parts = 0
        self._headers: dict[bytes, bytes] = {}
        self._header: tuple[bytes, bytes] = (b"", b"")
        self._name = ""
        self._value = b""
        self._is_file = False
        self.parser: MultipartParser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
                "on_end": self._end,
            },
        )

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _bad("file", f"a form may have at most {MAX_PARTS} fields")
        self._headers, self._header, self._value = {}, (b"", b""), b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        name, value = self._header
        self._header = (name + data[start:end], value)

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        name, value = self._header
        self._header = (name, value + data[start:end])

    def _header_end(self) -> None:
        name, value = self._header
        self._headers[name.lower()] = value
        self._header = (b"", b"")

    def _headers_finished(self) -> None:
        from python_multipart.multipart import parse_options_header  # as in `_receive`

        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = _text(options, b"name")
        self._is_file = self._name == "file"
        if not self._name:
            raise _bad("file", "a part of the form has no name", "invalid_multipart")
        if self._is_file:
            if self.form.size >= 0:
                raise _bad("file", "one file per upload")
            self.form.size = 0
            self.form.filename = (
                _text(options, b"filename").replace("\\", "/").rpartition("/")[2][:255] or "file"
            )

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self.form.size += end - start
            if self.form.size > MAX_FILE_BYTES:
                raise _too_large()
            self._out.write(data[start:end])
        else:
            self._value += data[start:end]
            if len(self._value) > MAX_FIELD_BYTES:
                raise _bad(self._name[:100], f"{self._name[:100]} is longer than {MAX_FIELD_BYTES} bytes")

    def _part_end(self) -> None:
        if not self._is_file:
            self.form.fields[self._name] = self._value.decode("utf-8", "replace")

    def _end(self) -> None:
        self.complete = True


def _text(options: Mapping[bytes, bytes], name: bytes) -> str:
    return options.get(name, b"").decode("utf-8", "replace")
