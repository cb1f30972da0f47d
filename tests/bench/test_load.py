"""`hayai bench load` against our real server process, one by URL, and llama-server where there is one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from hayai.bench.arrivals import TRACES
from hayai.bench.load import CASE_NAMES, Custom, run
from hayai.bench.load_bits import Answer, differences
from hayai.bench.load_cases import Closed
from hayai.bench.load_client import Exchange, Shot
from hayai.bench.load_metrics import Slo
from hayai.bench.load_replay import hopeless
from hayai.bench.load_report import text_report, write_json
from hayai.bench.load_session import LoadSession
from hayai.bench.load_sides import LOAD_PEERS, LoadOptions
from hayai.bench.peers import find, read_specs
from hayai.bench.table import WIDTH
from hayai.cli.bench import LOAD_CASES, TRACE_NAMES, command
from hayai.config import read_environment
from server_process import ServerProcess, start_server

TINY = Custom(concurrency=3, requests=6, prompt_tokens=24, output_tokens=8)


def options(model: Path, **changes: object) -> LoadOptions:
    known: dict[str, object] = {
        "model": str(model), "home": read_environment().home, "threads": 1, "pairs": 1, "peers": (),
        "quick": True,
    }  # fmt: skip
    return LoadOptions(**{**known, **changes})  # type: ignore[arg-type]


def measure(model: Path, custom: Custom | None = None, **changes: object) -> LoadSession:
    return run(options(model, **changes), lambda line: None, custom)


def test_the_command_names_what_there_is() -> None:
    assert LOAD_CASES == CASE_NAMES
    assert tuple(TRACES) == TRACE_NAMES


def test_a_closed_loop_against_our_own_server(default_model: Path, tmp_path: Path) -> None:
    session = measure(default_model, TINY, pairs=2)
    assert [r.pair for r in session.repetitions] == [0, 1]
    for found in session.repetitions:
        stats = found.stats
        assert (stats.num_requests, stats.num_ok, stats.failures) == (6, 6, {})
        assert stats.output_tokens == 6 * 8 and stats.cached_tokens == 0
        assert all(r.prompt_tokens == 24 and r.num_tokens == 8 for r in found.requests)
        assert stats.in_flight_max == 3
        assert 0 < stats.ttft.p50 < stats.e2e.p50
        assert 0 <= found.client_cpu < 0.5 < found.server_cpu + 0.5
    rows = {row.case for row in session.rows}
    assert rows == {"closed", "closed-ttft"}
    text = text_report(session, TINY)
    assert "3 users at a time, 24 in, 8 out" in text
    assert max(map(len, text.splitlines())) <= WIDTH
    write_json(session, tmp_path / "run.json", TINY)
    written = json.loads((tmp_path / "run.json").read_text())
    raw = written["repetitions"][0]["requests"][0]
    assert len(raw["times"]) == 8 and raw["times"] == sorted(raw["times"])
    assert raw["begun"] <= raw["times"][0] <= raw["finished"]


def test_prompts_are_never_used_twice(default_model: Path) -> None:
    session = measure(default_model, TINY, pairs=2)
    assert not any("VOID" in note for note in session.notes)
    loop = Closed(4, 3, 40, 1)
    prompts = [tuple(p) for user in loop.draw(session) for p in user]
    assert len({p[:16] for p in prompts}) == 12


@pytest.fixture(scope="module")
def by_url(default_model: Path) -> Iterator[ServerProcess]:
    server = start_server(default_model, "--threads", "1", "--context", "1024", backend="cpu")
    yield server
    server.interrupt()


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_an_open_loop_against_a_url_with_text_prompts(
    api: str, by_url: ServerProcess, default_model: Path
) -> None:
    custom = Custom(rate=20.0, requests=8, prompt_tokens=20, output_tokens=4)
    session = measure(
        default_model, custom, url=by_url.url, server_pid=by_url.process.pid, text_prompts=True, dialect=api
    )
    (found,) = session.repetitions
    assert found.stats.failures == {} and found.stats.num_ok == 8
    begun = sorted(r.begun for r in found.requests)
    assert begun[0] == pytest.approx(found.started)
    assert 2.0 < found.stats.offered_rate < 200.0
    assert found.server_cpu > 0


def test_a_url_where_nothing_listens_is_a_note_and_not_a_figure(default_model: Path) -> None:
    session = measure(default_model, TINY, url="http://127.0.0.1:9")
    assert session.rows == []
    assert any("ECONNREFUSED" in note for note in session.notes)


def test_named_cases_come_with_verdicts(default_model: Path, tmp_path: Path) -> None:
    """Prefix and bits, short: whatever the machine's speed, bits may not change."""
    out = tmp_path / "run.json"
    arguments = ["load", "--model", str(default_model), "--cases", "prefix,bits,mooncake", "--peers", "none"]
    environment = {"HAYAI_DATA": None}
    result = CliRunner(env=environment).invoke(
        command, [*arguments, "--quick", "--pairs", "1", "--threads", "1", "--json", str(out)]
    )
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    verdicts = {v["case"]: v for v in document["verdicts"]}
    assert verdicts["bits"]["passed"] is True, document["notes"]
    assert verdicts["prefix"]["passed"] is not None
    assert verdicts["mooncake"]["passed"] is None
    assert any("HAYAI_DATA" in note for note in document["notes"])
    values = {row["case"]: row["value"] for row in document["rows"]}
    assert values["prefix"] == pytest.approx(values["prefix-warm"] / values["prefix-cold"])
    assert values["bits"] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cases", "parallel9"],
        ["--concurrency", "2", "--rate", "1"],
        ["--header", "no colon"],
        ["--url", "ftp://x"],
        ["--trace", "azure"],
    ],
)
def test_options_that_make_no_sense_are_usage_errors(arguments: list[str]) -> None:
    assert CliRunner().invoke(command, ["load", *arguments]).exit_code == 2


def test_llama_server_runs_beside_us(default_model: Path) -> None:
    if not find(read_specs(LOAD_PEERS)["llama-server"], ()):
        pytest.skip("llama-server is not installed here")
    session = measure(default_model, TINY, peers=("llama-server",))
    sides = {r.side: r for r in session.repetitions}
    assert {"hayai serve", "llama-server same"} <= set(sides)
    for found in sides.values():
        assert found.stats.num_ok == 6 and found.stats.output_tokens == 48


# ---------------------------------------------------------------- what needs no server


def test_an_answer_that_changed_is_found() -> None:
    base = Answer("ab", ("a", "b"), ((-0.1, -0.2), None), "")
    wanted = {0: base}
    assert differences(wanted, {0: base}, "x") == {}
    assert differences(wanted, {0: Answer("ab", None, None, "")}, "x") == {}
    changed = {
        "another text x": Answer("ac", None, None, ""),
        "other tokens x": Answer("ab", ("ab",), ((-0.1, -0.2), None), ""),
        "other log-probabilities x": Answer("ab", ("a", "b"), ((-0.1, -0.20000001), None), ""),
        "failed x: status 500": Answer("", None, None, "status 500"),
    }
    for what, answer in changed.items():
        assert differences(wanted, {0: answer}, "x") == {0: what}


def test_a_hopeless_rate_is_given_up_and_no_other() -> None:
    """Of 20 requests 2 may miss: 2 s and 19 gaps of 50 ms are 2.95 s."""
    stop = hopeless(Slo(ttft=2.0, tpot=0.05), 20)

    def exchange(due: float, finished: float = float("nan")) -> Exchange:
        return Exchange(Shot(b"", 20, due), 0, due, finished=finished)

    late = [exchange(0.0, 3.0), exchange(0.0), exchange(1.0, 3.9)]
    assert not stop(3.0, late), "two missed, the third is in time"
    assert stop(5.0, [*late, exchange(2.0)]), "a third one is too late by now"
    assert not stop(4.9, [*late, exchange(2.0)])
