"""`hayai claim` from outside: text, JSON, and mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hayai_process import Hayai

VENDOR = (
    "claim", "glm-5.1", "--claim", "400", "--hardware", "b200", "--devices", "8", "--precision", "fp8",
    "--kv", "fp8", "--drafts", "3", "--tokens-per-step", "2.76", "--step-cost", "1.56", "--base-speed", "224",
)  # fmt: skip


def test_the_vendors_claim_as_text_and_as_json(hayai: Hayai) -> None:
    text = hayai(*VENDOR)
    assert text.returncode == 0 and text.stderr == ""
    assert "57 microseconds per layer" in text.stdout and "not excluded" in text.stdout
    assert max(map(len, text.stdout.splitlines())) <= 100
    data = json.loads(hayai(*VENDOR, "--json").stdout)
    assert data["schema"] == "hayai.claim/1" and data["claim"]["possible"] == "not excluded"
    assert data["steps"]["plain"]["total_bytes"] == pytest.approx(42.0e9, rel=2e-3)
    assert data["claim"]["layer_us"] == pytest.approx(56.7, abs=0.1)


def test_a_file_on_this_machine(hayai: Hayai, default_model: Path) -> None:
    """96.58 MB a step at 27 GB/s: 280 tok/s; a claim of 1,000 is impossible."""
    done = hayai("claim", default_model, "--bandwidth", "27", "--context", "1", "--claim", "1000", "--json")
    data = json.loads(done.stdout)
    assert data["ceiling"]["tok_s_per_request"] == pytest.approx(280, rel=5e-3)
    assert data["claim"]["possible"] == "impossible"


@pytest.mark.parametrize("option", ["--list", "--points", "--providers"])
def test_tables(hayai: Hayai, option: str) -> None:
    text, data = hayai("claim", option), hayai("claim", option, "--json")
    assert text.returncode == 0 and max(map(len, text.stdout.splitlines())) <= 100
    assert len(json.loads(data.stdout)) >= 5


@pytest.mark.parametrize(
    ("args", "code", "error"),
    [
        ((), 2, "give a MODEL, or one of --list"),
        (("glm-5.1",), 2, "give --hardware (a100, h100"),
        (("glm-5.1", "--hardware", "b200", "--bandwidth", "3"), 2, "give --hardware"),
        (("glm-5.1", "--bandwidth", "inf"), 2, "'inf' is not a finite number"),
        (("glm-5.1", "--points"), 2, "give a MODEL, or one of"),
        (("gpt-9", "--hardware", "b200"), 1, "'gpt-9' is no shape that is known: glm-5.1"),
        (("glm-5.1", "--hardware", "b900"), 1, "hardware 'b900' is not in the table: a100"),
        (("glm-5.1", "--hardware", "b200"), 1, "name one of bf16, fp8"),
        (("glm-5.1", "--hardware", "b200", "--precision", "fp5"), 2, "'fp5' is not one of"),
    ],
)
def test_mistakes_name_what_is_supported(hayai: Hayai, args: tuple[str, ...], code: int, error: str) -> None:
    done = hayai("claim", *args)
    assert (done.returncode, done.stdout) == (code, "")
    assert error in done.stderr


def doc_examples() -> list[tuple[str, str]]:
    """(command, output) of every console block in docs/claims.md."""
    text = (Path(__file__).parents[2] / "docs/claims.md").read_text()
    return re.findall(r"```console\n\$ hayai ((?:[^\n]*\\\n)*[^\n]*)\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize(("command", "output"), doc_examples(), ids=lambda text: text[:40])
def test_the_page_shows_what_the_program_says(hayai: Hayai, command: str, output: str) -> None:
    assert hayai(*command.replace("\\\n", "").split()).stdout == output


def test_the_page_has_examples() -> None:
    assert len(doc_examples()) == 3
