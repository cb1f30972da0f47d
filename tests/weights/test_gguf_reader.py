"""The GGUF reader: against the `gguf` package on a real file, and against files that lie."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from hayai.errors import ModelError
from hayai.formats import FORMATS, QuantTensor
from hayai.weights import gguf_reader
from hayai.weights.gguf_reader import GgufFile
from hayai.weights.gguf_writer import Typed, encode_gguf, write_gguf

HEADER_MS = 60
"""Most processor time that the whole header of the default model may take (98,000 strings)."""


def tensor(*shape: int, format: str = "f32") -> QuantTensor:
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return QuantTensor.from_float(values, format)


def opened(path: Path, data: bytes) -> GgufFile:
    path.write_bytes(data)
    return GgufFile(path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "x.gguf"


# ---------------------------------------------------------------- files that are right


@pytest.mark.model
def test_default_model_agrees_with_gguf_package(default_model: Path) -> None:
    theirs = gguf.GGUFReader(default_model)
    with GgufFile(default_model) as ours:
        fields = {k: v for k, v in theirs.fields.items() if not k.startswith("GGUF.")}
        assert list(ours.metadata) == list(fields)
        for key, field in fields.items():
            assert ours.metadata[key] == field.contents(), key
        assert list(ours.tensors) == [t.name for t in theirs.tensors]
        for their in theirs.tensors:
            info = ours.tensors[their.name]
            assert info.shape == tuple(reversed(their.shape.tolist()))
            assert info.format == their.tensor_type.name.lower()
            assert (info.offset, info.nbytes) == (their.data_offset, their.n_bytes)
        for their in theirs.tensors[:12] + theirs.tensors[-2:]:
            assert np.array_equal(ours.read(their.name).data.ravel(), their.data.view(np.uint8).ravel())


@pytest.mark.model
def test_header_of_default_model_is_quick(default_model: Path) -> None:
    best = 1e9
    for _ in range(5):
        start = time.process_time()
        GgufFile(default_model).close()
        best = min(best, time.process_time() - start)
    assert best * 1e3 < HEADER_MS


def test_every_metadata_type_survives(file: Path) -> None:
    metadata = {
        **{name: Typed(name, 1) for _, (name, _) in gguf_reader.SCALARS.items()},
        "string": "日本語 \0 text", "empty": "", "flag": True, "float": 0.5, "int": -7, "large": 1 << 40,
        "ints": [1, -2, 3], "floats": [0.25, -1.0], "flags": [True, False], "no strings": [],
        "strings": ["a", "", "ж"], "nested": [[1, 2], [3]], "bytes": Typed("uint8", [1, 255]),
        "lowest": Typed("int64", -(1 << 63)), "highest": Typed("uint64", (1 << 64) - 1),
    }  # fmt: skip
    ours = opened(file, encode_gguf(metadata, {"t": tensor(2, 3)}))
    want = {k: v.value if isinstance(v, Typed) else v for k, v in metadata.items()}
    assert ours.metadata == want
    assert type(ours.metadata["bool"]) is bool and type(ours.metadata["float64"]) is float
    ours.close()


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 8, 32, 4096])
def test_versions_and_alignments(file: Path, version: int, alignment: int) -> None:
    tensors = {"a": tensor(3), "b": tensor(2, 5), "c": tensor(2, 3, 64, format="q4_0")}
    with opened(file, encode_gguf({}, tensors, version=version, alignment=alignment)) as ours:
        assert (ours.version, ours.alignment) == (version, alignment)
        for name, want in tensors.items():
            got = ours.read(name)
            assert got.shape == want.shape and np.array_equal(got.data, want.data)


@pytest.mark.parametrize("name", FORMATS)
def test_gguf_package_reads_what_we_write(file: Path, name: str) -> None:
    want = tensor(4, 512, format=name)
    write_gguf(file, {"general.architecture": "llama", "list": ["x", "y"]}, {"w": want})
    theirs = gguf.GGUFReader(file)
    assert theirs.fields["list"].contents() == ["x", "y"]
    assert theirs.tensors[0].shape.tolist() == [512, 4]
    assert np.array_equal(theirs.tensors[0].data.view(np.uint8).reshape(4, -1), want.data)


@pytest.mark.parametrize(
    "strings",
    [
        [f"token{i}" for i in range(3000)],
        ["é" * (i % 60) + "x" for i in range(3000)],
        [""] * 1000,
        ["a", ""] * 700,
        ["\0"] * 900,
        ["a" * 300] * 400,
        ["x"] * 600 + ["y" * 255, "z" * 256] + ["x"] * 600,
        ["\0" * 7 + "\1" + "\0" * 7] * 500,
        ["q" * 200] * 300,
    ],
    ids=range(9),
)
def test_string_arrays_in_bulk_and_one_by_one_agree(file: Path, strings: list[str]) -> None:
    with opened(file, encode_gguf({"s": strings, "after": [1, 2, 3], "last": "end"}, {})) as ours:
        assert ours.metadata == {"s": strings, "after": [1, 2, 3], "last": "end"}


def test_ordinary_vocabulary_takes_the_bulk_path() -> None:
    strings = [f"Ġtoken{i}" for i in range(1000)]
    data = b"".join(struct.pack("<Q", len(s.encode())) + s.encode() for s in strings)
    window = np.frombuffer(data + b"\1\0\0\0\0\0\0\0tail", np.uint8)
    assert gguf_reader._strings_in_bulk(window, 1000) == (strings, len(data))
    assert gguf_reader._strings_in_bulk(window[: len(data) - 1], 1000) is None


def test_header_larger_than_the_first_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_reader, "_FIRST_READ", 64)
    metadata = {"s": [f"t{i}" for i in range(5000)], "k": 5, "text": "x" * 9000}
    with opened(file, encode_gguf(metadata, {"t": tensor(4, 4)})) as ours:
        assert ours.metadata == metadata
        assert ours.read("t").dequantize().tolist() == tensor(4, 4).dequantize().tolist()


def test_file_without_tensors(file: Path) -> None:
    with opened(file, encode_gguf({"general.architecture": "llama"}, {})) as ours:
        assert ours.tensors == {}
        with pytest.raises(ModelError, match=r"no tensor 'x' \(it has 0 tensors\)"):
            ours.read("x")


# ---------------------------------------------------------------- files that are wrong

KEY = struct.pack("<Q", 1) + b"k"
"""A metadata key 'k'."""


def header(tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def record(name: bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    start = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(dims))
    return start + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


def array(kind: int, length: int, body: bytes = b"") -> bytes:
    return KEY + struct.pack("<IIQ", 9, kind, length) + body


def padded(data: bytes, body: int = 0) -> bytes:
    return data + bytes(-len(data) % 32 + body)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "magic number needs 4 bytes and the file has 0 left"),
    "other magic": (b"PK\3\4" + bytes(40), r"not a GGUF file: it starts with b'PK"),
    "version 1": (header(version=1), "GGUF version 1; supported: 2 and 3"),
    "version 99": (header(version=99), "GGUF version 99"),
    "big endian": (b"GGUF\0\0\0\3" + bytes(32), "big-endian GGUF file; supported: little-endian"),
    "header cut": (header()[:20], "truncated or damaged"),
    "tensor count": (header(tensors=1 << 62), f"{1 << 62} tensors; supported: at most 65536"),
    "tensor count past file": (header(tensors=60000), "60000 tensors need at least 1920000 bytes"),
    "key count": (header(keys=1 << 63), "metadata keys; supported"),
    "key count past file": (header(keys=50000), "50000 metadata keys need at least"),
    "key length": (header(keys=1) + struct.pack("<Q", 1 << 63) + bytes(32), "a metadata key is .* bytes"),
    "key past file": (header(keys=1) + struct.pack("<Q", 60000) + bytes(32), "a metadata key needs 60000"),
    "key not UTF-8": (
        header(keys=1) + struct.pack("<Q", 2) + b"\xff\xfe" + bytes(32),
        "a metadata key is not valid UTF-8",
    ),
    "key twice": (header(keys=2) + 2 * (KEY + struct.pack("<IB", 0, 1)), "metadata key 'k' appears twice"),
    "value type": (header(keys=1) + KEY + struct.pack("<IQ", 13, 0), "metadata type 13; supported: 0 uint8"),
    "value cut": (header(keys=1) + KEY + struct.pack("<II", 10, 0), "the value of 'k' needs 8 bytes"),
    "string length": (
        header(keys=1) + KEY + struct.pack("<IQ", 8, (1 << 64) - 1),
        "18446744073709551615 bytes long; supported: at most 16777216",
    ),
    "string past file": (header(keys=1) + KEY + struct.pack("<IQ", 8, 100) + b"abc", "needs 100 bytes"),
    "bool": (header(keys=1) + KEY + struct.pack("<IB", 7, 2), "a bool that is 2"),
    "bools": (header(keys=1) + array(7, 2, b"\1\7"), "a bool that is 7"),
    "array length": (header(keys=1) + array(4, 1 << 61), "elements; supported: at most 4194304"),
    "array past file": (header(keys=1) + array(4, 4000000), "the value of 'k' needs 16000000 bytes"),
    "strings past file": (header(keys=1) + array(8, 4000000), "elements of 'k' need at least 32000000"),
    "string in array": (
        header(keys=1) + array(8, 300, bytes(2392) + struct.pack("<Q", 1 << 40)),
        "element 299 of 'k' is 1099511627776 bytes long",
    ),
    "array of unknown": (header(keys=1) + array(77, 1, b"\0"), "metadata type 77"),
    "array nesting": (
        header(keys=1) + KEY + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100,
        "nests arrays more than 4 deep",
    ),
    "many arrays": (
        header(keys=1) + array(9, 70000, struct.pack("<IQ", 0, 0) * 70000),
        "'k' holds 70000 arrays; supported: at most 65536",
    ),
    "arrays past file": (header(keys=1) + array(9, 4000000), "elements of 'k' need at least 48000000"),
    "alignment 0": (encode_gguf({"general.alignment": 0}, {}), "general.alignment is 0; supported: powers"),
    "alignment 48": (encode_gguf({"general.alignment": 48}, {}), "general.alignment is 48"),
    "alignment text": (encode_gguf({"general.alignment": "32"}, {}), "general.alignment is '32'"),
    "alignment bool": (encode_gguf({"general.alignment": True}, {}), "general.alignment is True"),
    "alignment huge": (encode_gguf({"general.alignment": 1 << 31}, {}), "general.alignment is 2147483648"),
    "name length": (
        header(tensors=1) + struct.pack("<Q", 1025) + bytes(2000), "a tensor name is 1025 bytes long"
    ),
    "no dimension": (padded(header(1) + record(b"t", ()), 64), "0 dimensions; supported: 1 to 4"),
    "five dimensions": (padded(header(1) + record(b"t", (1,) * 5), 64), "5 dimensions"),
    "dimensions past all": (header(1) + struct.pack("<QcI", 1, b"t", 1 << 31) + bytes(32), "dimensions"),
    "zero dimension": (padded(header(1) + record(b"t", (4, 0)), 64), r"shape \[0, 4\]; every dimension"),
    "overflowing product": (
        padded(header(1) + record(b"t", (1 << 32, 1 << 32)), 64), "takes 73786976294838206464 bytes"
    ),
    "overflow to zero": (padded(header(1) + record(b"t", (1 << 63, 2)), 64), "truncated or damaged"),
    "larger than file": (padded(header(1) + record(b"t", (64,)), 64), "takes 256 bytes and the whole file"),
    "past the end": (padded(header(1) + record(b"t", (16,), 0, 32), 64), "byte 160 and the file at 128"),
    "offset overflow": (
        padded(header(1) + record(b"t", (16,), 0, (1 << 64) - 32), 64), "ends at byte 18446744073709551"
    ),
    "misaligned": (padded(header(1) + record(b"t", (8,), 0, 4), 64), "offset 4, not a multiple of"),
    "type unknown": (padded(header(1) + record(b"t", (32,), 999), 64), r"999 \(unknown\); supported: f32"),
    "type not supported": (padded(header(1) + record(b"t", (32,), 23), 64), r"type 23 \(iq4_xs\)"),
    "half a block": (padded(header(1) + record(b"t", (48,), 2), 64), "rows of 48 weights; supported: multi"),
    "name twice": (padded(header(2) + record(b"t", (8,)) + record(b"t", (8,), 0, 32), 64), "appears twice"),
    "same place": (padded(header(2) + record(b"t", (8,)) + record(b"u", (8,)), 64), "'t' and 'u' overlap"),
    "overlap": (
        padded(header(3) + record(b"t", (16,)) + record(b"v", (8,), 0, 64) + record(b"u", (8,), 0, 32), 96),
        "'t' and 'u' overlap",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_a_clear_error(file: Path, case: str) -> None:
    data, message = HOSTILE[case]
    file.write_bytes(data)
    with pytest.raises(ModelError, match=message):
        GgufFile(file)


def test_every_truncation_is_an_error(file: Path) -> None:
    metadata = {"a": "text", "b": [1, 2], "c": ["x", "y"], "d": 1.5}
    data = encode_gguf(metadata, {"t": tensor(2, 4), "u": tensor(3)})
    for length in range(len(data)):
        file.write_bytes(data[:length])
        with pytest.raises(ModelError):
            GgufFile(file)


def test_claimed_sizes_allocate_nothing(file: Path) -> None:
    """A sparse file that backs a claim of gigabytes is stopped by the fixed limits."""
    with open(file, "wb") as out:
        out.write(header(keys=1) + KEY + struct.pack("<IQ", 8, 8 << 30))
        out.truncate(16 << 30)
    with pytest.raises(ModelError, match="supported: at most 16777216"):
        GgufFile(file)
    with open(file, "r+b") as out:
        out.write(header(keys=6) + b"".join(
            struct.pack("<Qc", 1, b"%d" % i) + struct.pack("<IQ", 8, 16 << 20) + bytes(16 << 20)
            for i in range(4)
        ))  # fmt: skip
    with pytest.raises(ModelError, match="the largest header supported"):
        GgufFile(file)


def test_total_of_array_elements_is_bounded(file: Path) -> None:
    nested = [Typed("uint8", [0] * 1_100_000)] * 4
    with pytest.raises(ModelError, match="supported: at most 4194304 in all arrays"):
        opened(file, encode_gguf({"k": nested}, {}))


def test_large_headers_take_little_time(file: Path) -> None:
    """A quarter of the slowest header that the limits let through: many keys, millions of empty strings."""
    count = gguf_reader.MAX_ARRAY_ELEMENTS // 4
    keys = b"".join(struct.pack("<Q5sIB", 5, b"%05d" % i, 0, 1) for i in range(gguf_reader.MAX_KEYS - 1))
    start = time.process_time()
    with opened(file, header(keys=gguf_reader.MAX_KEYS) + keys + array(8, count, bytes(8 * count))) as ours:
        assert ours.metadata["k"] == [""] * count
    assert time.process_time() - start < 4  # a second for the strings, more on a slow machine


def test_file_that_shrinks_after_opening(file: Path) -> None:
    with opened(file, encode_gguf({}, {"t": tensor(64)})) as ours:
        os.truncate(file, file.stat().st_size - 8)
        with pytest.raises(ModelError, match="ends after 248 of 256 bytes: the file has shrunk"):
            ours.read("t")


def test_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a directory; a model is a"):
        GgufFile(tmp_path)
    with pytest.raises(ModelError, match="No such file"):
        GgufFile(tmp_path / "none.gguf")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(ModelError, match="not a regular file"):
        GgufFile(fifo)
    with pytest.raises(ModelError, match="can't open"):
        GgufFile("a\0b")
