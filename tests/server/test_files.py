"""Files: as OpenAI's client uploads them, and as nobody should."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from hayai.server import files as files_module
from hayai.server.batch_store import BatchStore, StoredFile
from server_process import InnerServer

LINE = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}\n'


def upload(client: OpenAI, data: bytes = LINE, name: str = "in.jsonl", **more: Any) -> Any:
    return client.files.create(file=(name, io.BytesIO(data)), purpose="batch", **more)


def test_a_file_comes_back_as_it_was(client: OpenAI) -> None:
    data = bytes(range(256)) * 4000 + b"\r\n--x\r\n"
    file = upload(client, data, "Grüße.jsonl")
    assert (file.bytes, file.filename, file.purpose, file.status) == (
        len(data),
        "Grüße.jsonl",
        "batch",
        "processed",
    )
    assert client.files.content(file.id).read() == data
    assert client.files.retrieve(file.id) == file
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError, match="no such file"):
        client.files.retrieve(file.id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)


def test_files_are_listed_in_pages(client: OpenAI) -> None:
    made = [upload(client, name=f"{i}.jsonl").id for i in range(5)]
    listed = [file.id for file in client.files.list(limit=2)][: len(made)]
    assert listed == made[::-1]
    oldest_first = [file.id for file in client.files.list(limit=2, order="asc")]
    assert [i for i in oldest_first if i in made] == made
    assert client.files.list(limit=2).has_more
    assert not client.files.list(purpose="fine-tune").data
    with pytest.raises(openai.NotFoundError):
        client.files.list(after="file-of-nobody")
    for file_id in made:
        client.files.delete(file_id)


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches"])
@pytest.mark.parametrize(
    "limit", ["0", "-1", "x", "%C2%B2", "0" * 8 + "1" + "9" * 4, "0" * 8 + "1" + "0" * 4300]
)
def test_limits_that_are_none(http: httpx.Client, path: str, limit: str) -> None:
    """Among them numbers whose first nine digits are a good one."""
    reply = http.get(f"{path}?limit={limit}")
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == "limit"


def test_a_file_expires(client: OpenAI) -> None:
    after: Any = {"anchor": "created_at", "seconds": 3600}
    file = upload(client, expires_after=after)
    assert file.expires_at == file.created_at + 3600
    client.files.delete(file.id)
    with pytest.raises(openai.BadRequestError, match="from 3600 to 2592000"):
        upload(client, expires_after={**after, "seconds": 10})


SOON = {"purpose": "batch", "expires_after[anchor]": "created_at"}


@pytest.mark.parametrize(
    ("files", "data", "text"),
    [
        ({}, {"purpose": "batch", "x": "y"}, "file is required"),
        ({"file": b""}, {"purpose": "batch"}, "the file is empty"),
        ({"file": LINE}, {}, "purpose is required"),
        ({"file": LINE}, {"purpose": "fine-tune"}, "purpose must be batch"),
        ({"file": LINE}, {"purpose": "batch", "colour": "red"}, "unknown field: colour"),
        ({"file": LINE}, {"purpose": "x" * 2000}, "longer than 1024"),
        ({"file": LINE}, {"purpose": "batch"} | {f"f{i}": "x" for i in range(9)}, "at most 8 fields"),
        ([("file", LINE), ("file", LINE)], {"purpose": "batch"}, "one file per upload"),
        ({"file": LINE}, {"purpose": "batch", "expires_after[seconds]": "3600"}, "must be created_at"),
        ({"file": LINE}, SOON | {"expires_after[seconds]": "360000000x"}, "seconds must be from"),
        ({"file": LINE}, SOON | {"expires_after[seconds]": "²"}, "seconds must be from"),
    ],
)
def test_bad_forms(http: httpx.Client, files: Any, data: Any, text: str) -> None:
    if not files:
        files = {"other": (None, "z")}
    reply = http.post("/v1/files", files=files, data=data)
    assert reply.status_code == 400, reply.text
    assert text in reply.json()["error"]["message"]


def raw_form(body: bytes, boundary: str = "b") -> dict[str, Any]:
    return {"content": body, "headers": {"content-type": f"multipart/form-data; boundary={boundary}"}}


PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\nx\r\n'


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"not a form", 400),
        (PART, 400),
        (PART + b"--b", 400),
        (b"--b\r\n\r\nx\r\n--b--\r\n", 400),
        (b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n", 400),
        (b"--b\r\n" + b"A: b\r\n" * 50 + b"\r\nx\r\n--b--\r\n", 400),
        (b"--b\r\nA: " + b"b" * 100_000 + b"\r\n\r\nx\r\n--b--\r\n", 400),
    ],
)
def test_forms_that_are_none(http: httpx.Client, body: bytes, status: int) -> None:
    reply = http.post("/v1/files", **raw_form(body))
    assert reply.status_code == status, reply.text


def test_what_is_no_form(http: httpx.Client) -> None:
    assert http.post("/v1/files", json={}).status_code == 415
    assert http.post("/v1/files", content=b"x").status_code == 415
    kind = {"content-type": "multipart/form-data; boundary=" + "b" * 500}
    assert http.post("/v1/files", content=b"x", headers=kind).status_code == 415


def test_other_sites_send_nothing(http: httpx.Client) -> None:
    headers = {"sec-fetch-site": "cross-site"}
    reply = http.post("/v1/files", files={"file": LINE}, data={"purpose": "batch"}, headers=headers)
    assert reply.status_code == 403


def test_a_path_in_a_name_is_only_a_name(client: OpenAI) -> None:
    for name in ("../../etc/passwd", "..\\..\\boot.ini", "/"):
        file = upload(client, name=name)
        assert "/" not in file.filename and "\\" not in file.filename and file.filename
        assert client.files.content(file.id).read() == LINE
        client.files.delete(file.id)
    for name in ("..%2f..%2fbatches.sqlite", "%2e%2e", "file-x%00"):
        with pytest.raises(openai.NotFoundError):
            client.files.content(name)


def test_a_file_that_is_too_large(inner_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(files_module, "MAX_FILE_BYTES", 1000)
    server: InnerServer = inner_server(state_dir=tmp_path)
    url = f"{server.url}/v1/files"
    reply = httpx.post(url, files={"file": b"x" * 1001}, data={"purpose": "batch"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "file_too_large")
    much = (b"x" * 65536 for _ in range(1000))  # nobody reads that: the answer comes at once
    reply = httpx.post(url, content=much, headers={**_FORM, "content-length": "65536000"})
    assert reply.status_code == 413
    assert httpx.post(url, files={"file": b"x" * 1000}, data={"purpose": "batch"}).status_code == 200
    monkeypatch.setattr(files_module, "MAX_TENANT_BYTES", 1000)
    reply = httpx.post(url, files={"file": b"x"}, data={"purpose": "batch"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "storage_full")
    left = list((tmp_path / "batches" / "files").iterdir())
    assert len(left) == 1, "what was refused stays on the disk"


@pytest.mark.parametrize(("limit", "value"), [("MAX_TENANT_FILES", 1), ("MAX_TENANT_BYTES", 1500)])
def test_uploads_at_once_share_the_limit(
    inner_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, value: int
) -> None:
    """Another upload begins and ends in the middle of one: there is room for the first to end."""
    monkeypatch.setattr(files_module, limit, value)
    server: InnerServer = inner_server(state_dir=tmp_path)
    url = f"{server.url}/v1/files"
    contents = tmp_path / "batches" / "files"

    def halves() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        yield b"x" * 500
        end = time.monotonic() + 10
        while not list(contents.iterdir()):  # it has been let in
            assert time.monotonic() < end
            time.sleep(0.01)
        other = httpx.post(url, files={"file": b"x" * 1000}, data={"purpose": "batch"})
        assert other.status_code == 200, other.text
        yield b"x" * 500 + b"\r\n--b--\r\n"

    reply = httpx.post(url, content=halves(), headers=_FORM)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "storage_full")
    assert len(list(contents.iterdir())) == 1, "what was refused stays on the disk"
    listed = httpx.get(url).json()["data"]
    assert [file["bytes"] for file in listed] == [1000]


_FORM = {"content-type": "multipart/form-data; boundary=b"}


def test_another_tenants_file_does_not_exist(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    file_id, path = store.new_content()
    path.write_bytes(LINE)
    store.add_file(StoredFile(file_id, "acme", "batch", "f", len(LINE), 1))
    assert store.file("acme", file_id) is not None
    assert store.file("other", file_id) is None
    assert store.files("other", 10, None) == []
    assert store.usage("acme") == (1, len(LINE)) and store.usage("other") == (0, 0)
    store.close()


def test_what_a_dead_process_left_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BatchStore(tmp_path)
    _, half = store.new_content()
    half.write_bytes(b"half")
    file_id, path = store.new_content()
    path.write_bytes(LINE)
    store.add_file(StoredFile(file_id, "acme", "batch", "f", len(LINE), 1))
    assert store.claim()
    assert half.exists(), "somebody may be writing it"
    store.close()
    monkeypatch.setattr("hayai.server.batch_store.SWEEP_SECONDS", -1)
    store = BatchStore(tmp_path)
    assert store.claim()
    assert not half.exists() and store.content_path(file_id).read_bytes() == LINE
    store.close()
