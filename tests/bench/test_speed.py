"""`hayai bench speed` with our own engine and the default model, and with peers where they are installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from hayai.bench.cases import RAW_CASES, Sizes
from hayai.bench.peers import PeerFailure, Worker, find, read_specs
from hayai.bench.session import Session, SpeedOptions
from hayai.bench.speed import run
from hayai.cli.bench import command
from hayai.config import read_environment

TINY = Sizes(depth=40, decode_tokens=6, depth_tokens=4, prefill_tokens=48, batch_sequences=3, batch_steps=4)


def measure(model: Path, cases: tuple[str, ...], peers: tuple[str, ...] = (), pairs: int = 2) -> Session:
    options = SpeedOptions(
        model=str(model), home=read_environment().home, threads=1, pairs=pairs, cases=cases, peers=peers,
        sizes=TINY, calibration_rounds=1,
    )  # fmt: skip
    return run(options, lambda line: None)


def test_engine_cases_give_one_whole_row_per_repetition(default_model: Path) -> None:
    session = measure(default_model, ("decode", "decode-depth", "prefill", "batch", "ttft"))
    names = [case.name for case in RAW_CASES]
    raw = [r for r in session.rows if r.case in names]
    assert sorted({(r.case, r.pair) for r in raw}) == sorted(
        (name, pair) for name in names for pair in (0, 1)
    )
    lengths = {"decode": 7, "decode-depth": 5, "prefill": 1, "batch": 5}
    for row in raw:
        assert row.value > 0
        assert len(row.times) == lengths.get(row.case, 1)
        assert list(row.times) == sorted(row.times) and row.times[0] > 0
        assert row.load.wall >= row.times[-1]
    for row in raw:
        if row.case == "decode":
            assert row.value == pytest.approx(6 / (row.times[-1] - row.times[0]))
        if row.case == "batch":
            assert row.value == pytest.approx(3 * 4 / (row.times[-1] - row.times[0]))
        if row.case == "ttft-32":
            assert row.value == pytest.approx(row.times[0] * 1e3)


def test_decode_rows_stand_beside_the_roofline_of_their_pair(default_model: Path) -> None:
    session = measure(default_model, ("decode",))
    for row in session.rows:
        assert row.roofline_before is not None and row.roofline_after is not None
        assert row.roofline_before.gb_per_second[1] > 0.5
        counted = session.bytes_of["same"]
        assert row.step_bytes == pytest.approx(
            counted.total(32 + 3.5, screened=True, survivors=float(row.extra["survivors"]))
        )


def test_the_command_writes_json_and_a_table(default_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    arguments = [
        "speed",
        "--model",
        str(default_model),
        "--cases",
        "decode,start",
        "--peers",
        "none",
        "--pairs",
        "1",
    ]
    result = CliRunner().invoke(command, [*arguments, "--decode-tokens", "8", "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert "decode after a 32-token prompt, 8 tokens" in result.output
    assert "process start to first token" in result.output
    document = json.loads(out.read_text())
    assert document["options"]["sizes"]["decode_tokens"] == 8
    assert {row["case"] for row in document["rows"]} == {"decode", "start"}
    assert {"load", "times", "roofline_before", "contaminated"} <= set(document["rows"][0])
    assert any(v["case"] == "start" and v["passed"] is not None for v in document["verdicts"])


@pytest.mark.parametrize("option", [["--cases", "decod"], ["--peers", "ollama"]])
def test_unknown_names_are_usage_errors(option: list[str]) -> None:
    result = CliRunner().invoke(command, ["speed", *option])
    assert result.exit_code == 2
    assert "is none of" in result.output


def test_a_missing_peer_is_reported_with_its_command(default_model: Path) -> None:
    missing = [name for name, spec in read_specs().items() if not find(spec, ())]
    if not missing:
        pytest.skip("all peers are installed here")
    session = measure(default_model, ("decode",), peers=tuple(missing), pairs=1)
    assert set(session.missing) == set(missing)
    assert all("pip install" in text for text in session.missing.values())
    assert {row.side for row in session.rows} == {"hayai"}


@pytest.mark.parametrize("name", ["llama.cpp", "ik_llama.cpp"])
def test_an_installed_library_peer_runs_beside_us(name: str, default_model: Path) -> None:
    if not find(read_specs()[name], ()):
        pytest.skip(f"{name} is not installed here")
    session = measure(default_model, ("decode", "batch"), peers=(name,))
    sides = {row.side for row in session.rows}
    assert {"hayai", f"{name} same"} <= sides
    assert len([r for r in session.rows if r.case == "batch" and r.side == f"{name} same"]) == 2
    assert max(side.idle_cpu() for side in session.peers) <= 0.05


def test_a_peer_that_can_not_start_says_so(tmp_path: Path) -> None:
    """worker.py in our own Python, without the peer: the import error ends up in the message."""
    if find(read_specs()["llama.cpp"], ()):
        pytest.skip("llama.cpp is installed here")
    import sys

    worker = Worker("llama.cpp", sys.executable, tmp_path / "log")
    try:
        with pytest.raises(PeerFailure, match="No module named 'llama_cpp'"):
            worker.call("hello")
    finally:
        worker.close()
