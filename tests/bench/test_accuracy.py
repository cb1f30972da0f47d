"""Teacher-forced accuracy: the arithmetic on small arrays, the whole on the default model."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from hayai.bench.accuracy import NEAR_TIE, excess, read_text, score
from hayai.bench.inprocess import LogitRunner
from hayai.cli.bench import command
from hayai.errors import ConfigError


def test_scores_of_known_logits() -> None:
    wanted = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]], np.float32))
    got = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.7, 0.2]], np.float32))
    found = score(got, wanted + 3.0, np.array([0, 2]))
    assert found["kl"] == pytest.approx([0.0, 0.7 * np.log(3.5) + 0.2 * np.log(1 / 3.5)], abs=1e-6)
    assert found["gap"] == pytest.approx([0.0, np.log(3.5)], abs=1e-6)
    assert found["noise"][0] == pytest.approx(0.0, abs=1e-6)
    assert found["nll"] == pytest.approx([np.log(2), np.log(5)], abs=1e-6)
    assert found["reference_nll"] == pytest.approx([np.log(2), -np.log(0.7)], abs=1e-6)


def test_texts_come_from_a_file_a_folder_or_are_made_up(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("not a text")
    with pytest.raises(ConfigError, match="no text file"):
        read_text(tmp_path, 10)
    (tmp_path / "b.tokens.gz").write_bytes(gzip.compress("größer".encode()))
    assert read_text(tmp_path, 10) == ("größer", "b.tokens.gz")
    (tmp_path / "a.txt").write_text("first")
    assert read_text(tmp_path, 10) == ("first", "a.txt")
    made, source = read_text(None, 1000)
    assert len(made) >= 1000 and "made-up" in source
    assert read_text(None, 1000)[0] == made


def test_logits_of_a_window_do_not_depend_on_what_ran_before(default_model: Path) -> None:
    runner = LogitRunner(str(default_model), "cpu", 1)
    try:
        window = list(range(1000, 1100))
        first = np.concatenate(list(runner.logits(window)))
        list(runner.logits(window[::-1]))
        assert first.shape == (100, runner.loaded.model_config.vocab_size)
        np.testing.assert_array_equal(first, np.concatenate(list(runner.logits(window))))
    finally:
        runner.close()


def test_the_cpu_backend_predicts_as_float32_does(default_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "accuracy.json"
    arguments = ["accuracy", "--model", str(default_model), "--tokens", "192", "--json", str(out)]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    ours = found["engines"][0]
    assert (found["num_tokens"], ours["name"]) == (191, "cpu")
    assert 0 < ours["kl_mean"] < 0.01
    assert ours["kl_max"] < 0.3
    assert ours["real_disagreements"] <= 191 * 0.01
    assert ours["perplexity"] == pytest.approx(found["reference_perplexity"] * (1 + ours["excess"]))
    assert abs(ours["excess"]) < 0.02
    assert NEAR_TIE == 0.2 and "near-tie rule (0.2 logits)" in result.output


def test_the_error_of_a_perplexity_ratio_shrinks_with_the_text() -> None:
    rng = np.random.default_rng(3)
    base = rng.exponential(3.0, 40_000)
    noise = rng.normal(0.002, 0.08, 40_000)
    ratio, error = excess(base + noise, base)
    assert ratio == pytest.approx(math.exp(noise.mean()) - 1)
    assert error == pytest.approx(0.08 / 200, rel=0.05)
    assert excess(base, base) == (0.0, 0.0)
