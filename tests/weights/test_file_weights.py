"""Weight slots filled from a file: sources, transforms, shapes, and bits that must not change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hayai.errors import ModelError
from hayai.formats import FORMATS, QuantTensor
from hayai.plan.plan import Transform, WeightSlot
from hayai.weights.gguf import GgufFile
from hayai.weights.gguf_writer import write_gguf
from hayai.weights.loader import FileWeights

RNG = np.random.default_rng(7)


def matrix(rows: int, cols: int, format: str = "f32") -> QuantTensor:
    return QuantTensor.from_float(RNG.standard_normal((rows, cols)), format)


TENSORS = {
    "m": matrix(12, 64, "q4_1"),
    "plain": matrix(6, 10),
    "e0": matrix(4, 32, "q8_0"),
    "e1": matrix(4, 32, "q8_0"),
    "e2": matrix(4, 32, "q4_0"),
    "narrow": matrix(4, 64, "q8_0"),
    "bias": QuantTensor.from_float(np.arange(9), "f32"),
    "row": QuantTensor.from_float(np.arange(9)[None], "f32"),
    "cube": QuantTensor.from_float(RNG.standard_normal((3, 4, 32)), "q5_0"),
    "k": matrix(4, 512, "q6_k"),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileWeights]:
    path = tmp_path_factory.mktemp("weights") / "w.gguf"
    with GgufFile(write_gguf(path, {}, TENSORS)) as file:
        yield FileWeights(file)


def slot(shape: tuple[int, ...], *names: str, transforms: tuple[Transform, ...] = ()) -> WeightSlot:
    return WeightSlot("w", shape, {"gguf": names}, transforms)


def values(name: str) -> NDArray[np.float32]:
    return TENSORS[name].dequantize()


@pytest.mark.parametrize("name", TENSORS)
def test_plain_slot_keeps_the_bits(weights: FileWeights, name: str) -> None:
    want = TENSORS[name]
    got = weights.fetch(slot(want.shape, name))
    assert (got.format, got.shape) == (want.format, want.shape)
    assert np.array_equal(got.data, want.data)


def test_first_source_that_exists_wins(weights: FileWeights) -> None:
    wanted = slot((12, 64), "absent", "m", "plain")
    assert weights.has(wanted)
    assert np.array_equal(weights.fetch(wanted).data, TENSORS["m"].data)


def test_missing_tensor_is_named(weights: FileWeights) -> None:
    wanted = slot((1, 1), "x", "y")
    assert not weights.has(wanted)
    with pytest.raises(ModelError, match="weight w: the file lacks tensor 'x' or 'y'"):
        weights.fetch(wanted)
    other = WeightSlot("w", (1,), {"hf": ("z",)})
    with pytest.raises(ModelError, match="no source named"):
        weights.fetch(other)


def test_fallback_slot(weights: FileWeights) -> None:
    embed = WeightSlot("embed", (12, 64), {"gguf": ("m",)})
    head = WeightSlot("head", (12, 64), {"gguf": ("absent",)}, fallback="embed")
    assert not weights.has(head)
    with pytest.raises(ModelError, match="weight head: the file lacks tensor 'absent'"):
        weights.fetch(head)
    both = FileWeights(weights.file, slots={"embed": embed, "head": head})
    assert np.array_equal(both.fetch(head).data, TENSORS["m"].data)


@pytest.mark.parametrize("container", ["gguf", "hf"])
def test_container_chooses_the_names(weights: FileWeights, container: str) -> None:
    wanted = WeightSlot("w", (4, 32), {"gguf": ("e0",), "hf": ("e1",)})
    got = FileWeights(weights.file, container).fetch(wanted)
    assert np.array_equal(got.data, TENSORS["e0" if container == "gguf" else "e1"].data)


def test_shape_must_be_the_slots(weights: FileWeights) -> None:
    with pytest.raises(ModelError, match=r"tensor 'm'\) has shape \[12, 64\]; the model needs \[64, 12\]"):
        weights.fetch(slot((64, 12), "m"))
    assert weights.fetch(slot((9,), "row")).shape == (9,)
    assert weights.fetch(slot((1, 9), "bias")).shape == (1, 9)
    with pytest.raises(ModelError, match="has shape"):
        weights.fetch(slot((9, 1), "bias"))


@pytest.mark.parametrize(
    ("start", "stop", "block"), [(0, 5, 0), (3, 12, 0), (0, 2, 4), (1, 4, 4), (2, 3, 3), (0, 12, 12)]
)
def test_rows(weights: FileWeights, start: int, stop: int, block: int) -> None:
    blocks = values("m").reshape(-1, block or 12, 64)[:, start:stop]
    want = blocks.reshape(-1, 64)
    got = weights.fetch(slot(want.shape, "m", transforms=(Transform("rows", start, stop, block),)))
    assert got.format == "q4_1"
    assert np.array_equal(got.dequantize(), want)


def test_rows_of_a_vector_are_its_elements(weights: FileWeights) -> None:
    got = weights.fetch(slot((4,), "bias", transforms=(Transform("rows", 2, 6),)))
    assert got.dequantize().tolist() == [2, 3, 4, 5]


def test_rows_of_stacked_matrices(weights: FileWeights) -> None:
    got = weights.fetch(slot((3, 2, 32), "cube", transforms=(Transform("rows", 1, 3),)))
    assert got.format == "q5_0" and np.array_equal(got.dequantize(), values("cube")[:, 1:3])


@pytest.mark.parametrize(("start", "stop", "format"), [(0, 32, "q4_1"), (32, 64, "q4_1"), (5, 40, "f32")])
def test_columns(weights: FileWeights, start: int, stop: int, format: str) -> None:
    wanted = slot((12, stop - start), "m", transforms=(Transform("columns", start, stop),))
    got = weights.fetch(wanted)
    assert got.format == format
    assert np.array_equal(got.dequantize(), values("m")[:, start:stop])


def test_columns_of_superblocks(weights: FileWeights) -> None:
    got = weights.fetch(slot((4, 256), "k", transforms=(Transform("columns", 256, 512),)))
    assert got.format == "q6_k" and np.array_equal(got.dequantize(), values("k")[:, 256:])


def test_stack(weights: FileWeights) -> None:
    stack = (Transform("stack"),)
    got = weights.fetch(slot((2, 4, 32), "e0", "e1", transforms=stack))
    assert got.format == "q8_0"
    assert np.array_equal(got.dequantize(), np.stack([values("e0"), values("e1")]))
    mixed = weights.fetch(slot((2, 4, 32), "e0", "e2", transforms=stack))
    assert mixed.format == "f32"
    assert np.array_equal(mixed.dequantize(), np.stack([values("e0"), values("e2")]))
    with pytest.raises(ModelError, match="lacks tensor 'e9' of 2"):
        weights.fetch(slot((2, 4, 32), "e0", "e9", transforms=stack))
    with pytest.raises(ModelError, match="unlike shapes"):
        weights.fetch(slot((2, 4, 32), "e0", "narrow", transforms=stack))
    assert not weights.has(slot((2, 4, 32), "e8", "e9", transforms=stack))


def test_heads(weights: FileWeights) -> None:
    heads = values("m").reshape(3, 4, 64)
    got = weights.fetch(slot((3, 4, 64), "m", transforms=(Transform("heads", heads=3),)))
    assert got.format == "q4_1" and np.array_equal(got.dequantize(), heads)
    turned = weights.fetch(slot((3, 64, 4), "m", transforms=(Transform("heads_t", heads=3),)))
    assert turned.format == "f32" and np.array_equal(turned.dequantize(), heads.transpose(0, 2, 1))


def test_rows_then_heads_as_latent_attention_does(weights: FileWeights) -> None:
    """kv_b holds per head the key part's rows, then the value part's."""
    parts = values("m").reshape(2, 6, 64)
    keys = (Transform("rows", 0, 4, 6), Transform("heads_t", heads=2))
    got = weights.fetch(slot((2, 64, 4), "m", transforms=keys))
    assert np.array_equal(got.dequantize(), parts[:, :4].transpose(0, 2, 1))
    rest = (Transform("rows", 4, 6, 6), Transform("heads", heads=2))
    got = weights.fetch(slot((2, 2, 64), "m", transforms=rest))
    assert got.format == "q4_1" and np.array_equal(got.dequantize(), parts[:, 4:])


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (Transform("rows", 0, 13), "has 12 rows; can't take rows 0 to 13 of every 12"),
        (Transform("rows", 0, 2, 5), "can't take rows 0 to 2 of every 5"),
        (Transform("rows", 3, 3), "can't take rows 3 to 3"),
        (Transform("columns", 0, 65), "has 64 columns; can't take columns 0 to 65"),
        (Transform("columns", -32, 32), "can't take columns -32 to 32"),
        (Transform("heads", heads=5), r"\[12, 64\] can't be cut into 5 heads"),
        (Transform("heads_t", heads=0), "can't be cut into 0 heads"),
    ],
)
def test_transform_that_does_not_fit(weights: FileWeights, transform: Transform, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        weights.fetch(slot((1, 1), "m", transforms=(transform,)))


@pytest.mark.parametrize("name", FORMATS)
def test_pure_selections_keep_the_bits_of_every_format(tmp_path: Path, name: str) -> None:
    tensor = matrix(8, 512, name)
    with GgufFile(write_gguf(tmp_path / "f.gguf", {}, {"t": tensor})) as file:
        wanted = WeightSlot(
            "w", (4, 256), {"gguf": ("t",)}, (Transform("rows", 2, 4, 4), Transform("columns", 256, 512))
        )
        got = FileWeights(file).fetch(wanted)
    assert got.format == name
    want = tensor.dequantize().reshape(2, 4, 512)[:, 2:, 256:].reshape(4, 256)
    assert np.array_equal(got.dequantize(), want)
