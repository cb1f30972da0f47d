"""The sampling oracle, against direct statements of what each parameter means."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from hayai.backends.base import SamplingRow, TokenHistory
from hayai.backends.sampling_reference import sample_row, splitmix64, uniform, unpack_mask

LOGITS = np.array([1.0, 3.0, -2.0, 2.0, 0.5, 3.0, -1.0, 0.0], np.float32)
NAN = float("nan")


def softmax(x: NDArray[np.float32]) -> NDArray[np.float64]:
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def frequencies(row: SamplingRow, count: int = 4000, **extra: object) -> dict[int, float]:
    counts = Counter(
        sample_row(LOGITS, replace(row, seed=17), position, **extra).token  # type: ignore[arg-type]
        for position in range(count)
    )
    return {token: n / count for token, n in counts.items()}


def packed(allowed: set[int], vocab: int = 8) -> NDArray[np.uint32]:
    words = np.zeros(-(-vocab // 32), np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << (token % 32))
    return words


def test_splitmix64_gives_the_published_sequence() -> None:
    """The first outputs of SplitMix64 from state 0, 1234567 (its reference implementation)."""
    golden = 0x9E3779B97F4A7C15
    assert [splitmix64(i * golden % (1 << 64)) for i in range(2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert splitmix64(1234567) == 6457827717110365317


def test_uniform_is_24_bits_of_seed_and_position() -> None:
    values = [uniform(seed, position) for seed in range(40) for position in range(100)]
    assert all(0 <= v < 1 and v * (1 << 24) == int(v * (1 << 24)) for v in values)
    assert abs(np.mean(values) - 0.5) < 0.02
    assert len(set(values)) > 3990
    assert uniform((1 << 64) - 1, 5) == uniform(-1, 5)


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert sample_row(LOGITS, SamplingRow(), 0).token == 1


def test_nan_never_wins() -> None:
    logits = np.array([NAN, 1.0, NAN, 2.0], np.float32)
    for row in (SamplingRow(), SamplingRow(temperature=0.1, num_logprobs=2)):
        assert sample_row(logits, row, 3).token == 3
    assert sample_row(np.full(4, NAN, np.float32), SamplingRow(temperature=1.0), 0).token == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_draws_from_the_softmax(temperature: float) -> None:
    expected = softmax(LOGITS / np.float32(temperature))
    found = frequencies(SamplingRow(temperature=temperature))
    for token, p in enumerate(expected):
        assert found.get(token, 0.0) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 4000) + 1e-3)


def test_a_choice_depends_on_seed_and_position_only() -> None:
    row = SamplingRow(temperature=1.0, seed=5)
    first = [sample_row(LOGITS, row, p).token for p in range(50)]
    assert first == [sample_row(LOGITS, row, p).token for p in range(50)]
    assert first != [sample_row(LOGITS, replace(row, seed=6), p).token for p in range(50)]


def test_top_k_keeps_the_first_of_equals() -> None:
    assert set(frequencies(SamplingRow(temperature=1.0, top_k=1), 200)) == {1}
    assert set(frequencies(SamplingRow(temperature=1.0, top_k=3))) == {1, 5, 3}
    assert set(frequencies(SamplingRow(temperature=5.0, top_k=100))) == set(range(8))


def test_top_p_keeps_the_shortest_prefix_that_holds_it() -> None:
    p = softmax(LOGITS)
    two = float(p[1] + p[5])
    assert set(frequencies(SamplingRow(temperature=1.0, top_p=two - 1e-6))) == {1, 5}
    assert set(frequencies(SamplingRow(temperature=1.0, top_p=two + 1e-6))) == {1, 5, 3}
    assert set(frequencies(SamplingRow(temperature=1.0, top_p=1e-9), 200)) == {1}


def test_top_p_is_of_what_top_k_leaves() -> None:
    """Of three tokens the two best hold more than 0.84, of all tokens they hold less."""
    p = softmax(LOGITS)
    assert p[1] + p[5] < 0.84 < (p[1] + p[5]) / (p[1] + p[5] + p[3])
    assert set(frequencies(SamplingRow(temperature=1.0, top_p=0.84))) == {1, 5, 3}
    assert set(frequencies(SamplingRow(temperature=1.0, top_p=0.84, top_k=3))) == {1, 5}


def test_min_p_is_relative_to_the_best_after_temperature() -> None:
    at = math.exp(-1.0)  # token 3 stands 1 below the best
    assert set(frequencies(SamplingRow(temperature=1.0, min_p=at - 1e-4))) == {1, 5, 3}
    assert set(frequencies(SamplingRow(temperature=1.0, min_p=at + 1e-4))) == {1, 5}
    assert set(frequencies(SamplingRow(temperature=2.0, min_p=at + 1e-4))) == {1, 5, 3}


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    history = TokenHistory(np.array([1, 5, 2], np.int32), np.array([0, 2, 1], np.int32))
    row = SamplingRow(repetition_penalty=2.0)
    assert sample_row(LOGITS, row, 0, history).token == 3
    negative = np.array([-1.0, -1.5], np.float32)
    seen = TokenHistory(np.array([0], np.int32), np.array([1], np.int32))
    assert sample_row(negative, row, 0, seen).token == 1


def test_presence_and_frequency_count_the_output_only() -> None:
    prompt_only = TokenHistory(np.array([1, 5], np.int32), np.array([0, 0], np.int32))
    assert sample_row(LOGITS, SamplingRow(presence_penalty=2.0), 0, prompt_only).token == 1
    history = TokenHistory(np.array([1, 5], np.int32), np.array([1, 4], np.int32))
    assert sample_row(LOGITS, SamplingRow(presence_penalty=0.9), 0, history).token == 1
    assert sample_row(LOGITS, SamplingRow(presence_penalty=1.1), 0, history).token == 3
    assert sample_row(LOGITS, SamplingRow(frequency_penalty=0.9), 0, history).token == 1
    assert sample_row(LOGITS, SamplingRow(frequency_penalty=1.1), 0, history).token == 3


def test_bias_comes_after_penalties() -> None:
    history = TokenHistory(np.array([4], np.int32), np.array([1], np.int32))
    row = SamplingRow(repetition_penalty=2.0, bias=((4, 2.8),))
    assert sample_row(LOGITS, row, 0, history).token == 4  # 0.5 / 2 + 2.8 > 3; (0.5 + 2.8) / 2 < 3
    assert sample_row(LOGITS, SamplingRow(bias=((1, -100.0), (5, -100.0))), 0).token == 3


def test_mask_lets_only_its_tokens_through() -> None:
    mask = packed({0, 4, 6})
    assert sample_row(LOGITS, SamplingRow(bias=((2, 100.0),)), 0, mask=mask).token == 0
    assert set(frequencies(SamplingRow(temperature=3.0), mask=mask)) == {0, 4, 6}
    wide = packed({0, 31, 32, 63, 64}, 70)
    assert np.flatnonzero(unpack_mask(wide, 70)).tolist() == [0, 31, 32, 63, 64]


def test_logprobs_are_of_the_raw_logits() -> None:
    row = SamplingRow(temperature=0.3, bias=((4, 50.0),), num_logprobs=3, repetition_penalty=3.0)
    found = sample_row(LOGITS, row, 0, mask=packed({4, 6}))
    logprobs = np.log(softmax(LOGITS))
    assert found.token == 4
    assert found.logprob == pytest.approx(logprobs[4], abs=1e-6)
    assert found.top_ids.tolist() == [1, 5, 3]
    np.testing.assert_allclose(found.top_logprobs, logprobs[[1, 5, 3]], atol=1e-6)


def test_logprobs_only_where_asked() -> None:
    none = sample_row(LOGITS, SamplingRow(), 0)
    assert math.isnan(none.logprob)
    assert len(none.top_ids) == 0
    chosen_only = sample_row(LOGITS, SamplingRow(num_logprobs=0), 0)
    assert chosen_only.logprob == pytest.approx(math.log(softmax(LOGITS)[1]), abs=1e-6)
    assert len(chosen_only.top_ids) == 0
