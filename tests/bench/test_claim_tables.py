"""What is shipped as data: public points below their ceilings, hardware with sources, models from files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from hayai.bench.claim import Setup, ceiling
from hayai.bench.claim_models import find_model, named_model
from hayai.bench.claim_points import best_point, check_points, find_hardware, hardware_table, providers
from hayai.bench.claim_report import list_text, points_text, providers_text
from hayai.bench.claim_runs import predictions
from hayai.bench.inprocess import Roofline
from hayai.bench.machine import Load
from hayai.bench.rows import Row
from hayai.bench.table import WIDTH
from hayai.errors import ConfigError, ModelError

CHECKED = [one for one in check_points() if not one.point.missing]


@pytest.mark.parametrize("one", CHECKED, ids=lambda one: f"{one.point.model} {one.point.title}")
def test_no_public_point_exceeds_its_ceiling(one: Any) -> None:
    assert one.ceiling.fits is not False, "what was measured must have fitted"
    assert 0.01 < one.share <= 1.0
    assert one.point.tok_s <= one.ceiling.hard
    assert one.point.source and one.point.precision and one.point.hardware


def test_there_are_enough_points_and_the_others_say_what_they_lack() -> None:
    assert len(CHECKED) >= 12 and len({one.point.source for one in CHECKED}) >= 5
    for one in check_points():
        if one.point.missing:
            assert one.ceiling is None and one.share is None and one.point.source


def test_shares_that_the_literature_states() -> None:
    """301 tok/s are 20 % of the limit of 8 x B200, 52.6 about 6 % of 8 x H200."""
    share = {(one.point.model, one.point.tok_s): one.share for one in CHECKED}
    assert share["glm-5.1", 301] == pytest.approx(0.20, abs=0.005)
    assert share["glm-5.2", 52.6] == pytest.approx(0.06, abs=0.005)


def test_the_best_point_is_of_this_hardware() -> None:
    model = named_model("glm-5.1")
    best = best_point(Setup(model, find_hardware("b200"), "fp8", devices=8))
    assert best is not None and best.point.tok_s == 301
    assert best_point(Setup(model, find_hardware("tpu-v5e"), "fp8")) is None


def test_hardware_rows_are_whole() -> None:
    kinds = {row.kind for row in hardware_table().values()}
    assert kinds == {"cpu", "gpu", "accelerator"}
    for row in hardware_table().values():
        assert row.source and row.date and row.bandwidth_gb_s > 0
        assert all(rate > 0 for rate in row.tflops.values())
    with pytest.raises(ConfigError, match=r"is not in the table: a100, h100"):
        find_hardware("abacus")


def test_providers_are_claims_and_say_what_is_not_disclosed() -> None:
    claimed = {p.model: p.claimed_tok_s for p in providers()}
    assert claimed == {
        "GLM-5.1-highspeed": 400, "GPT-4o": 150, "Claude 3.5 Sonnet": 120, "Gemini 1.5 Flash": 180,
        "Llama 2 70B": 80,
    }  # fmt: skip
    assert all(p.undisclosed and p.claimed_by and p.measured == "not measured: no key" for p in providers())


def test_tables_fit_a_hundred_columns() -> None:
    for text in (list_text(), points_text(check_points()), providers_text(providers())):
        assert max(map(len, text.splitlines())) <= WIDTH
    assert "34.2%" in points_text(check_points()) and "not checkable" in points_text(check_points())


# ---------------------------------------------------------------- models from files

LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip


def test_a_config_json_is_the_shape_of_the_same_model(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    bounds = [
        ceiling(Setup(model, find_hardware("h100"), "bf16")).per_request
        for model in (find_model(str(path)), named_model("llama-3.1-8b"))
    ]
    assert bounds[0] == bounds[1]


def test_a_toml_of_model_config(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    config = dataclasses.asdict(named_model("smollm2-135m").config)
    lines = [f"{k} = {json.dumps(v)}" for k, v in config.items() if k != "rope"]
    path.write_text("\n".join(lines))
    assert find_model(str(path)).config.hidden_size == 576


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model_type": "bert"}, "architecture 'bert' has no plan; supported: "),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_layers is 1000000000; supported: an integer from 1 to 4096"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"model_type": "deepseek_v3"}, "num_experts, experts_per_token"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, change: dict[str, object], error: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA | change))
    with pytest.raises(ModelError, match=error):
        find_model(str(path))


@pytest.mark.parametrize(("name", "text"), [("a.json", "{"), ("b.json", "[1]"), ("c.toml", "= 3")])
def test_files_that_are_no_configs(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ModelError, match=name):
        find_model(str(path))


def test_names_that_are_not_known() -> None:
    with pytest.raises(ModelError, match=r"'gpt-9' is no shape that is known: glm-5\.1.*\.gguf"):
        find_model("gpt-9")
    with pytest.raises(ModelError, match="no such file"):
        find_model("missing.gguf")


# ---------------------------------------------------------------- our own runs


def run_file(path: Path, rows: list[Row], depth: int = 1024) -> Path:
    """A run as `bench speed --json` writes it, with the parts that predictions read."""
    document = {
        "options": {"sizes": {"depth": depth}},
        "files": {"same": {"path": "models/tiny.gguf"}},
        "rows": [dataclasses.asdict(row) | {"contaminated": False} for row in rows],
    }
    path.write_text(json.dumps(document, default=str))
    return path


def measured(case: str, pair: int, value: float, step_bytes: float, roof: float) -> Row:
    values: dict[str, Any] = {
        field.name: 0.0 for field in dataclasses.fields(Load) if field.default is dataclasses.MISSING
    }
    reading = Roofline({1: roof / 2, 2: roof})
    return Row(
        case, "hayai", "hayai", "same", pair, value, "tok/s", 0.0, (0.1, 0.2), Load(**values),
        reading, reading, step_bytes, value, threads=2,
    )  # fmt: skip


def test_prediction_beside_measurement(tmp_path: Path) -> None:
    """40 GB/s over 100 MB are 400 steps a second; 320 measured are 80 %. Rows without bytes have no bound."""
    rows = [measured("decode", pair, 320.0, 100e6, 40.0) for pair in range(3)]
    rows += [measured("decode-depth", 0, 250.0, 125e6, 40.0), measured("prefill", 0, 900.0, 0.0, 40.0)]
    decode, depth = predictions(run_file(tmp_path / "run.json", rows, depth=2048))
    assert (decode.case, decode.depth, decode.n, decode.model) == ("decode", None, 3, "tiny.gguf")
    assert decode.predicted == pytest.approx(400) and decode.share == pytest.approx(0.8)
    assert depth.depth == 2048 and depth.predicted == pytest.approx(320)
    assert depth.share == pytest.approx(250 / 320)


def test_files_that_are_no_runs(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, error in (
        ("{", "JSON"),
        ("{}", "bench speed --json"),
        ('{"rows":[{}],"options":{},"files":{}}', "KeyError"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=error):
            predictions(path)
    with pytest.raises(ConfigError, match="no row of ours"):
        predictions(run_file(path, [measured("prefill", 0, 900.0, 0.0, 40.0)]))
