"""Batches: as OpenAI's client runs them, and what becomes of them when something goes wrong."""

from __future__ import annotations

import io
import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from hayai.server import batch_runner, batches
from hayai.server.access import Access
from hayai.server.batch_store import Batch, BatchStore, Result, StoredFile
from hayai.server.errors import ApiError
from hayai.server.handle import run_job
from hayai.server.storage import Database
from server_process import InnerServer, start_server

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"


def chat_line(custom_id: str, **more: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": f"Say {custom_id}"}], "max_tokens": 4} | more
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def text_line(custom_id: str, **more: Any) -> dict[str, Any]:
    body = {"prompt": f"{custom_id} is", "max_tokens": 4, "temperature": 0} | more
    return {"custom_id": custom_id, "method": "POST", "url": COMPLETION, "body": body}


def upload(client: OpenAI, lines: Sequence[object]) -> str:
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    return client.files.create(file=("in.jsonl", io.BytesIO(b"\n".join(raw))), purpose="batch").id


def create(client: OpenAI, lines: Sequence[object], endpoint: Any = CHAT, **more: Any) -> Any:
    return client.batches.create(
        input_file_id=upload(client, lines), endpoint=endpoint, completion_window="24h", **more
    )


def ended(client: OpenAI, batch_id: str, seconds: float = 60.0) -> Any:
    """The batch once it is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        batch = client.batches.retrieve(batch_id)
        if batch.status in ("completed", "failed", "expired", "cancelled"):
            return batch
        time.sleep(0.05)
    raise AssertionError(f"still {batch.status}: {batch.request_counts}")


def rows(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def test_every_line_has_its_answer_in_order(client: OpenAI) -> None:
    names = [f"line-{i}" for i in range(20)]
    batch = create(client, [chat_line(name) for name in names], metadata={"job": "test"})
    assert batch.status == "validating" and batch.metadata == {"job": "test"}
    batch = ended(client, batch.id)
    assert batch.status == "completed" and batch.error_file_id is None
    assert vars(batch.request_counts) == {"total": 20, "completed": 20, "failed": 0}
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    assert batch.expires_at == batch.created_at + 86_400
    found = rows(client, batch.output_file_id)
    assert [row["custom_id"] for row in found] == names
    assert len({row["id"] for row in found}) == 20
    bodies = [row["response"]["body"] for row in found]
    assert all(row["response"]["status_code"] == 200 and row["error"] is None for row in found)
    assert all(body["object"] == "chat.completion" for body in bodies)
    assert len({body["id"] for body in bodies}) == 20
    assert batch.usage.output_tokens == sum(body["usage"]["completion_tokens"] for body in bodies)
    assert batch.usage.input_tokens == sum(body["usage"]["prompt_tokens"] for body in bodies)
    card = client.files.retrieve(batch.output_file_id)
    assert card.purpose == "batch_output" and card.filename == f"{batch.id}_output.jsonl"
    assert batch.id in [b.id for b in client.batches.list()]


def test_a_batch_answers_as_the_same_requests_would(client: OpenAI) -> None:
    prompts = [f"{i} and" for i in range(6)]
    lines = [text_line(str(i), prompt=prompt, n=2, logprobs=1, seed=3) for i, prompt in enumerate(prompts)]
    batch = ended(client, create(client, lines, COMPLETION).id)
    for row, prompt in zip(rows(client, batch.output_file_id), prompts, strict=True):
        alone = client.completions.create(
            model="default", prompt=prompt, max_tokens=4, temperature=0, n=2, logprobs=1, seed=3
        )
        # texts only: the reference backend is not the one that promises equal bits
        texts = [choice["text"] for choice in row["response"]["body"]["choices"]]
        assert texts == [choice.text for choice in alone.choices]


def test_lines_that_fail_are_in_the_error_file(client: OpenAI) -> None:
    lines = [
        chat_line("good"),
        chat_line("too hot", temperature=9),
        chat_line("who", model="gpt-9"),
        chat_line("long", messages=[{"role": "user", "content": "x " * 5000}]),
        chat_line("also good"),
    ]
    batch = ended(client, create(client, lines).id)
    assert batch.status == "completed"
    assert vars(batch.request_counts) == {"total": 5, "completed": 2, "failed": 3}
    assert [row["custom_id"] for row in rows(client, batch.output_file_id)] == ["good", "also good"]
    errors = {row["custom_id"]: row["response"] for row in rows(client, batch.error_file_id)}
    assert {name: r["status_code"] for name, r in errors.items()} == {"too hot": 400, "who": 404, "long": 400}
    assert errors["too hot"]["body"]["error"]["param"] == "temperature"
    assert errors["long"]["body"]["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("lines", "code", "line"),
    [
        ([b"{"], "invalid_json_line", 1),
        ([chat_line("a"), b"", b"[]"], "invalid_json_line", 3),
        ([chat_line("a"), chat_line("a")], "duplicate_custom_id", 2),
        ([chat_line("")], "invalid_custom_id", 1),
        ([chat_line("x" * 513)], "invalid_custom_id", 1),
        ([text_line("a")], "mismatched_url", 1),
        ([{**chat_line("a"), "method": "GET"}], "invalid_method", 1),
        ([{**chat_line("a"), "body": []}], "invalid_body", 1),
        ([chat_line("a", stream=True)], "invalid_body", 1),
        ([{**chat_line("a"), "headers": {}}], "unknown_parameter", 1),
        ([b"\n \n"], "empty_file", None),
    ],
)
def test_a_file_that_is_wrong_fails_before_a_line_runs(
    client: OpenAI, lines: Sequence[object], code: str, line: int | None
) -> None:
    batch = ended(client, create(client, lines).id)
    assert batch.status == "failed" and batch.output_file_id is None
    assert (batch.errors.data[0].code, batch.errors.data[0].line) == (code, line)
    assert batch.request_counts.total == 0


def test_what_can_not_be_asked_for(client: OpenAI) -> None:
    file_id = upload(client, [chat_line("a")])
    good: dict[str, Any] = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    for change, param in (
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"completion_window": "169h"}, "completion_window"),
        ({"metadata": {"x": "y" * 513}}, "metadata.x"),
        ({"metadata": {str(i): "y" for i in range(17)}}, "metadata"),
        ({"extra_body": {"colour": "red"}}, "colour"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.batches.create(**{**good, **change})
        assert caught.value.param == param
    with pytest.raises(openai.NotFoundError):
        client.batches.create(**{**good, "input_file_id": "file-of-nobody"})
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_of_nobody")
    with pytest.raises(openai.NotFoundError):
        client.batches.cancel("batch_of_nobody")
    batch = ended(client, client.batches.create(**good).id)
    with pytest.raises(openai.ConflictError, match="it is completed"):
        client.batches.cancel(batch.id)
    with pytest.raises(openai.BadRequestError, match="its purpose is batch_output"):
        client.batches.create(**{**good, "input_file_id": batch.output_file_id})


StartServer = Callable[..., InnerServer]


def start(inner_server: StartServer, **options: Any) -> OpenAI:
    return OpenAI(base_url=f"{inner_server(**options).url}/v1", api_key="none", max_retries=0)


def test_a_cancelled_batch_keeps_what_it_has(inner_server: StartServer) -> None:
    with start(inner_server, batch_parallel=2) as client:
        lines = [text_line(str(i), max_tokens=60, ignore_eos=True) for i in range(200)]
        batch = create(client, lines, COMPLETION)
        while client.batches.retrieve(batch.id).request_counts.completed < 3:
            time.sleep(0.02)
        assert client.batches.cancel(batch.id).status == "cancelling"
        with pytest.raises(openai.ConflictError, match="still reads"):
            client.files.delete(batch.input_file_id)
        batch = ended(client, batch.id)
        assert batch.status == "cancelled" and batch.cancelled_at >= batch.cancelling_at
        good, bad = rows(client, batch.output_file_id), rows(client, batch.error_file_id)
        assert 3 <= len(good) < 200 and len(good) + len(bad) == 200
        assert {row["error"]["code"] for row in bad} == {"batch_cancelled"}
        assert {row["custom_id"] for row in [*good, *bad]} == {str(i) for i in range(200)}
        assert client.batches.cancel(batch.id).status == "cancelled"
        client.files.delete(batch.input_file_id)


def test_a_revoked_key_ends_its_batch(inner_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(inner_server, batch_parallel=1) as client:
        lines = [text_line(str(i), max_tokens=60, ignore_eos=True) for i in range(300)]
        batch = create(client, lines, COMPLETION)
        while client.batches.retrieve(batch.id).request_counts.completed < 3:
            time.sleep(0.02)
        monkeypatch.setattr(Access, "principal", lambda self, key_id: None)
        batch = ended(client, batch.id)
        assert batch.status == "cancelled" and 3 <= batch.request_counts.completed < 300
        assert [error.code for error in batch.errors.data] == ["invalid_api_key"]


def test_no_line_runs_once_the_key_is_revoked(
    inner_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line after the one during which it was revoked is the first that does not run."""
    calls = []

    async def run_and_revoke(*args: Any) -> bytes:
        calls.append(args)
        body = await run_job(*args)
        monkeypatch.setattr(Access, "principal", lambda self, key_id: None)
        return body

    monkeypatch.setattr(batch_runner, "run_job", run_and_revoke)
    with start(inner_server, batch_parallel=1) as client:
        batch = ended(client, create(client, [chat_line(str(i)) for i in range(20)]).id)
        assert batch.status == "cancelled" and batch.request_counts.completed == len(calls) == 1
        assert batch.request_counts.failed == 19


def test_lines_run_as_their_key_may_now(chat_model: Path, tmp_path: Path) -> None:
    """Under two batches: the tenant's models change, the key is revoked."""
    path = str(tmp_path / "keys.db")
    with Database(path) as database:
        key, record = database.create_key("acme")
        watching, _ = database.create_key("acme")
        options = ("--database", path, "--state-dir", str(tmp_path / "state"))
        server = start_server(chat_model, *options)
        to_server: dict[str, Any] = {"base_url": f"{server.url}/v1", "max_retries": 0}
        try:
            with OpenAI(api_key=key, **to_server) as client, OpenAI(api_key=watching, **to_server) as watcher:
                lines = [text_line(str(i), max_tokens=60, ignore_eos=True) for i in range(600)]
                first = begun(watcher, create(client, lines, COMPLETION).id)
                database.set_tenant("acme", {"models": frozenset({"another"})})
                batch = ended(watcher, first)
                assert batch.status == "completed" and 3 <= batch.request_counts.completed < 600
                bad = rows(watcher, batch.error_file_id)
                assert {row["response"]["body"]["error"]["code"] for row in bad} == {"model_not_allowed"}
                database.set_tenant("acme", {"models": None})
                time.sleep(1.0)  # a running server follows within about a second
                second = begun(watcher, create(client, lines, COMPLETION).id)
                database.revoke_key(record.key_id)
                batch = ended(watcher, second)
                assert batch.status == "cancelled" and 3 <= batch.request_counts.completed < 600
                assert [error.code for error in batch.errors.data] == ["invalid_api_key"]
            assert server.interrupt() == (0, "stopped\n")
        finally:
            server.process.kill()
            server.process.wait()


def begun(client: OpenAI, batch_id: str) -> str:
    """The batch once some of its lines are done."""
    while client.batches.retrieve(batch_id).request_counts.completed < 3:
        time.sleep(0.02)
    return batch_id


@pytest.mark.parametrize(
    ("code", "tries"),
    [("engine_unavailable", batch_runner.MAX_ENGINE_FAILURES + 1), ("insufficient_quota", 1)],
)
def test_an_error_that_lasts_is_the_lines_result(
    inner_server: StartServer, monkeypatch: pytest.MonkeyPatch, code: str, tries: int
) -> None:
    calls = []

    async def fail(*args: Any) -> bytes:
        calls.append(args)
        raise ApiError(503, "it does not work", code=code, headers={"Retry-After": "0.01"})

    monkeypatch.setattr(batch_runner, "run_job", fail)
    with start(inner_server) as client:
        batch = ended(client, create(client, [chat_line("a")]).id)
        assert batch.status == "completed" and batch.request_counts.failed == 1
        (row,) = rows(client, batch.error_file_id)
        assert row["response"]["body"]["error"]["code"] == code
    assert len(calls) == tries


def test_only_failures_of_the_engine_are_counted(
    inner_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = ["shutting_down"] * 5 + ["engine_unavailable"] * batch_runner.MAX_ENGINE_FAILURES

    async def fail_for_a_while(*args: Any) -> bytes:
        if codes:
            raise ApiError(503, "not now", code=codes.pop(0), headers={"Retry-After": "0.01"})
        return await run_job(*args)

    monkeypatch.setattr(batch_runner, "run_job", fail_for_a_while)
    with start(inner_server) as client:
        batch = ended(client, create(client, [chat_line("a")]).id)
        assert not codes and vars(batch.request_counts) == {"total": 1, "completed": 1, "failed": 0}


def test_a_line_that_waits_holds_no_other_up(
    inner_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    async def refuse_the_first(*args: Any) -> bytes:
        calls.append(args[2].request_id)
        if len(calls) == 1:
            raise ApiError(429, "not now", code="rate_limit_exceeded", headers={"Retry-After": "3"})
        return await run_job(*args)

    monkeypatch.setattr(batch_runner, "run_job", refuse_the_first)
    with start(inner_server, batch_parallel=1) as client:
        names = [str(i) for i in range(10)]
        batch = ended(client, create(client, [chat_line(name) for name in names]).id)
        assert batch.status == "completed" and batch.request_counts.completed == 10
        assert [row["custom_id"] for row in rows(client, batch.output_file_id)] == names
    assert calls[-1] == calls[0] and len(set(calls)) == 10 and len(calls) == 11


def test_lines_that_wait_are_few(inner_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every line is refused, the file is not read into memory, and the batch can still be cancelled."""
    calls = []

    async def refuse(*args: Any) -> bytes:
        calls.append(args[2].request_id)
        raise ApiError(429, "not now", code="rate_limit_exceeded", headers={"Retry-After": "30"})

    monkeypatch.setattr(batch_runner, "run_job", refuse)
    with start(inner_server, batch_parallel=2) as client:
        batch = create(client, [chat_line(str(i)) for i in range(200)])
        seen = -1
        while not calls or seen != len(calls):
            seen = len(calls)
            time.sleep(0.5)
        assert 16 <= len(calls) <= 16 + 2 and len(set(calls)) == len(calls)
        client.batches.cancel(batch.id)
        assert ended(client, batch.id, 10).status == "cancelled"


def test_a_batch_expires(inner_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "window_seconds", lambda window: 1)
    with start(inner_server, batch_parallel=1) as client:
        lines = [text_line(str(i), max_tokens=200, ignore_eos=True) for i in range(300)]
        batch = ended(client, create(client, lines, COMPLETION).id)
        assert batch.status == "expired" and batch.expired_at >= batch.expires_at
        bad = rows(client, batch.error_file_id)
        assert {row["error"]["code"] for row in bad} == {"batch_expired"}
        assert batch.request_counts.completed + len(bad) == 300


def test_a_batch_that_expired_stays_so(inner_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is interrupted when every line has its row, the last ones as expired, and picked up again."""
    finalize, interrupted = BatchStore.finalize, []

    def fail_once(self: BatchStore, batch: Batch, status: str) -> Batch:
        if not interrupted:
            found = self.batch(batch.tenant, batch.id)
            assert found is not None
            interrupted.append(found)
            raise OSError("the disk is full")
        return finalize(self, batch, status)

    monkeypatch.setattr(BatchStore, "finalize", fail_once)
    monkeypatch.setattr(batches, "window_seconds", lambda window: 1)
    with start(inner_server, batch_parallel=1) as client:
        lines = [text_line(str(i), max_tokens=200, ignore_eos=True) for i in range(300)]
        batch = ended(client, create(client, lines, COMPLETION).id)
        (before,) = interrupted
        assert before.status == "finalizing" and before.completed + before.failed == before.total == 300
        assert batch.status == "expired" and batch.expired_at >= batch.expires_at
        assert batch.completed_at is None
        assert {row["error"]["code"] for row in rows(client, batch.error_file_id)} == {"batch_expired"}


def test_a_batch_cancelled_as_it_ends_is_cancelled(
    inner_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look at a batch and its entry as finalizing."""
    update = BatchStore.update_batch

    def cancel_first(self: BatchStore, batch_id: str, expected: Any, **changes: Any) -> Batch | None:
        if changes.get("status") == "finalizing":
            update(self, batch_id, ("in_progress",), status="cancelling")
        return update(self, batch_id, expected, **changes)

    monkeypatch.setattr(BatchStore, "update_batch", cancel_first)
    with start(inner_server) as client:
        batch = ended(client, create(client, [chat_line("a")]).id)
        assert batch.status == "cancelled" and batch.request_counts.completed == 1


def test_a_batch_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Its record lacks the fields that came later."""
    store = BatchStore(tmp_path)
    store.add_batch(make_batch("batch_a", status="in_progress"))
    store.close()
    with closing(sqlite3.connect(tmp_path / "batches.sqlite")) as db, db:
        record = json.loads(db.execute("SELECT record FROM batches").fetchone()[0])
        del record["outcome"], record["engine_failures"]
        db.execute("UPDATE batches SET record = ?", (json.dumps(record),))
        db.execute("PRAGMA user_version=1")
    store = BatchStore(tmp_path)
    batch = store.batch("acme", "batch_a")
    assert batch is not None and batch.outcome is None and batch.engine_failures == {}
    store.close()


def test_batches_wait_for_people(inner_server: StartServer) -> None:
    """While a stream runs one line runs beside it; without it as many as are allowed."""
    server = inner_server(batch_parallel=4)
    gate_lines: list[int] = []
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        lines = [text_line(str(i), max_tokens=20, ignore_eos=True) for i in range(40)]
        stream = client.completions.create(
            model="default", prompt="x", max_tokens=400, extra_body={"ignore_eos": True}, stream=True
        )
        next(iter(stream))
        batch = create(client, lines, COMPLETION)
        for _ in stream:
            gate_lines.append(server.frontend.stats().running)
        assert gate_lines and max(gate_lines) <= 2, "more than one line beside a stream"
        busy = 0
        while client.batches.retrieve(batch.id).status != "completed":
            busy = max(busy, server.frontend.stats().running)
        assert 1 < busy <= 4


def test_tenants_see_only_their_own(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    store.add_batch(make_batch("batch_a", "acme"))
    assert store.batch("acme", "batch_a") is not None
    assert store.batch("other", "batch_a") is None
    assert store.batches("other", 10, None) == []
    store.close()


def make_batch(batch_id: str, tenant: str = "acme", **more: Any) -> Batch:
    values = {"created_at": 1, "endpoint": CHAT, "input_file_id": "f", "completion_window": "24h"}
    return Batch(id=batch_id, tenant=tenant, expires_at=1 << 40, **{**values, **more})


def test_a_result_counts_once(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    store.add_batch(make_batch("batch_a", status="in_progress", total=2))
    for _ in range(3):
        store.add_results("batch_a", [Result(0, True, b"first", 5, 1, 2)])
    store.add_results("batch_a", [Result(0, False, b"second"), Result(1, False, b"bad")])
    batch = store.batch("acme", "batch_a")
    assert batch is not None and (batch.completed, batch.failed) == (1, 1)
    assert (batch.prompt_tokens, batch.cached_tokens, batch.completion_tokens) == (5, 1, 2)
    assert store.done_lines("batch_a") == {0, 1}
    done = store.finalize(batch, "completed")
    assert store.content_path(str(done.output_file_id)).read_bytes() == b"first\n"
    assert store.content_path(str(done.error_file_id)).read_bytes() == b"bad\n"
    store.close()


def test_finalizing_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies after the files are written and before the batch names them."""
    store = BatchStore(tmp_path)
    store.add_batch(make_batch("batch_a", status="finalizing", total=3))
    store.add_results("batch_a", [Result(i, True, b"%d" % i) for i in (2, 0, 1)])
    batch = store.batch("acme", "batch_a")
    assert batch is not None

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hayai.server.batch_store._insert_file", die)
    with pytest.raises(KeyboardInterrupt):
        store.finalize(batch, "completed")
    store.close()
    monkeypatch.undo()
    store = BatchStore(tmp_path)
    found = store.unfinished()
    assert [b.status for b in found] == ["finalizing"] and found[0].completed == 3
    done = store.finalize(found[0], "completed")
    assert done.status == "completed" and done.output_file_id is not None
    assert store.content_path(done.output_file_id).read_bytes() == b"0\n1\n2\n"
    assert store.done_lines("batch_a") == set()
    assert store.file("acme", done.output_file_id) is not None
    store.close()


def test_one_process_runs_a_folders_batches(tmp_path: Path) -> None:
    one, other = BatchStore(tmp_path), BatchStore(tmp_path)
    assert one.claim() and one.claim() and not other.claim()
    one.close()
    assert other.claim()
    other.close()


def test_a_change_needs_the_expected_state(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    store.add_batch(make_batch("batch_a"))
    assert store.update_batch("batch_a", ("in_progress",), status="completed") is None
    changed = store.update_batch("batch_a", ("validating",), status="in_progress", total=7)
    assert changed is not None and changed.total == 7 and "in_progress" in changed.times
    assert store.batch("acme", "batch_a") == changed
    store.close()


def test_a_line_is_always_the_same_request() -> None:
    """What a crash repeats is the same: id and, where none is named, the seed."""
    from hayai.engine.request import SamplingParams
    from hayai.frontend import Prompt
    from hayai.server.job import Job

    job = Job("chat", None, (Prompt(text="x"),), SamplingParams())
    one, again = (batch_runner.line_job(job, "batch_a", 3, 0) for _ in range(2))
    assert one == again and one.params.seed is not None
    others = [
        batch_runner.line_job(job, b, n, a) for b, n, a in (("b", 3, 0), ("batch_a", 4, 0), ("batch_a", 3, 1))
    ]
    assert len({one.request_id, *(other.request_id for other in others)}) == 4
    seeded = batch_runner.line_job(Job("chat", None, job.prompts, SamplingParams(seed=5)), "batch_a", 3, 0)
    assert seeded.params.seed == 5


def test_lines_of_a_file(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    file_id, path = store.new_content()
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\n  two  \n\nthree")
    store.add_file(StoredFile(file_id, "acme", "batch", "f", 1, 1))
    assert list(store.lines(file_id, 100)) == [(0, b"one"), (2, b"two"), (4, b"three")]
    store.close()
