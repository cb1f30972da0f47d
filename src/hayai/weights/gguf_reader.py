"""The GGUF container (versions 2 and 3, little-endian), read as if it came from an enemy.

Layout (the GGUF specification of the ggml project): magic, version, tensor count, metadata count; metadata as
(key, type, value); tensor records as (name, dimensions, type, offset); padding to the alignment; tensor data.
Nothing is believed before it is checked: a count or a length is compared with the bytes that are left in the
file, and with a fixed limit, before anything is allocated for it; a tensor must lie inside the file, aligned,
and overlap no other. Whatever is wrong is a ModelError that says what was found and what is supported.

The file is read with pread, never kept mapped. Start-up time is a feature: arrays of strings (a vocabulary
and its merges are 98,000) are cut in bulk: `_strings_in_bulk`.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from hayai.errors import ModelError
from hayai.formats import FORMATS, Format, QuantTensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

MAX_HEADER_BYTES = 64 << 20
MAX_STRING_BYTES = 16 << 20
MAX_KEY_BYTES = 65535
MAX_NAME_BYTES = 1024
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_ARRAY_ELEMENTS = 1 << 22
"""Array elements of one file in all. (The largest vocabularies known have 262,144 tokens.)"""
MAX_ARRAY_DEPTH = 4
MAX_NESTED_ARRAYS = 1 << 16
MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 20

SCALARS: dict[int, tuple[str, str]] = {
    0: ("uint8", "<u1"),
    1: ("int8", "<i1"),
    2: ("uint16", "<u2"),
    3: ("int16", "<i2"),
    4: ("uint32", "<u4"),
    5: ("int32", "<i4"),
    6: ("float32", "<f4"),
    7: ("bool", "<u1"),
    10: ("uint64", "<u8"),
    11: ("int64", "<i8"),
    12: ("float64", "<f8"),
}
"""Metadata types of fixed size: number in the file -> (name, numpy dtype)."""
BOOL, STRING, ARRAY = 7, 8, 9

UNSUPPORTED_TYPES: dict[int, str] = {
    9: "q8_1", 15: "q8_k", 16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs", 19: "iq1_s", 20: "iq4_nl", 21: "iq3_s",
    22: "iq2_s", 23: "iq4_xs", 24: "i8", 25: "i16", 26: "i32", 27: "i64", 28: "f64", 29: "iq1_m",
    34: "tq1_0", 35: "tq2_0", 39: "mxfp4", 40: "nvfp4",
}  # fmt: skip
"""Names of GGML tensor types that we know of and can't read, for the error message."""

_FORMAT_OF_TYPE: dict[int, Format] = {f.ggml_type: f for f in FORMATS.values()}
_UINT64 = struct.Struct("<Q")
_FIRST_READ = 4 << 20
_BULK_FROM = 256
"""Arrays of at least this many strings are tried in bulk."""
_BULK_BYTES_EACH = 32
"""How far ahead that looks, in bytes per string: a bound on the work that a hostile file can cause."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. shape: numpy order (last dimension contiguous); offset: from the file's start."""

    name: str
    format: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GgufFile:
    """An open GGUF file: `metadata` and `tensors` are parsed and checked, tensor data is read on demand.

    metadata: key -> bool, int, float, str, or a list of them. tensors: name -> TensorInfo, in file order.
    Reading is thread safe. ModelError: the file can't be opened, or anything in it is wrong.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.size = _checked_size(self.path)
        try:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (closed by close())
        except OSError as error:
            raise ModelError(f"can't open {self.path}: {error.strerror}") from error
        try:
            header = _Header(self.path, self._file.fileno(), self.size)
            self.version, self.metadata, self.tensors = header.parse()
            self.alignment = header.alignment
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str) -> QuantTensor:
        """The tensor called `name`, with the bits of the file. ModelError where there is none."""
        info = self.tensors.get(name)
        if info is None:
            raise ModelError(f"{self.path} has no tensor {name!r} (it has {len(self.tensors)} tensors)")
        data = np.empty(info.nbytes, np.uint8)
        _pread_into(self._file.fileno(), data, info.offset, f"{self.path}: tensor {name!r}")
        rows = math.prod(info.shape[:-1])
        return QuantTensor(info.format, info.shape, data.reshape(rows, info.nbytes // rows))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _checked_size(path: Path) -> int:
    """Size in bytes; ModelError for a path that is missing or is not a regular file."""
    try:
        status = path.stat()
    except OSError as error:
        raise ModelError(f"can't open {path}: {error.strerror}") from error
    except ValueError as error:  # a NUL character in the path
        raise ModelError(f"can't open {str(path)!r}: {error}") from error
    if stat.S_ISDIR(status.st_mode):
        raise ModelError(f"{path} is a directory; a model is a .gguf file")
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{path} is not a regular file; a model is a .gguf file")
    return status.st_size


def _pread_into(fd: int, target: NDArray[np.uint8], offset: int, what: str) -> None:
    """Fill `target` from the file; a file that has shrunk since it was opened is a ModelError."""
    view, done = target.data, 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise ModelError(f"{what} can't be read: {error.strerror}") from error
        if count == 0:
            raise ModelError(f"{what} ends after {done} of {len(view)} bytes: the file has shrunk")
        done += count


class _Header:
    """One pass over the header. `data` holds the file's first bytes and grows as they are needed."""

    def __init__(self, path: Path, fd: int, size: int) -> None:
        self.path, self.fd, self.size = path, fd, size
        self.limit = min(size, MAX_HEADER_BYTES)
        self.data = b""
        self.position = 0
        self.elements = self.nested = 0
        self.alignment = DEFAULT_ALIGNMENT
        self.grow(min(_FIRST_READ, self.limit))

    def error(self, message: str) -> ModelError:
        return ModelError(f"{self.path}: {message} (at byte {self.position})")

    # ------------------------------------------------------------ bytes

    def grow(self, length: int) -> None:
        """Have at least `length` bytes (not more than the limit), twice as many as now if there are."""
        length = min(max(length, 2 * len(self.data)), self.limit)
        more = np.empty(length - len(self.data), np.uint8)
        _pread_into(self.fd, more, len(self.data), f"{self.path}: the header")
        self.data += more.tobytes()

    def need(self, count: int, what: str) -> None:
        """Make sure that `count` more bytes are there."""
        end = self.position + count
        if end <= len(self.data):
            return
        if end > self.size:
            left = self.size - self.position
            raise self.error(f"{what} needs {count} bytes and the file has {left} left: truncated or damaged")
        if end > self.limit:
            raise self.error(f"{what} ends past {MAX_HEADER_BYTES} bytes, the largest header supported")
        self.grow(end)

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        start = self.position
        self.position += count
        return self.data[start : self.position]

    def integer(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what), "little")

    def text(self, limit: int, what: str) -> str:
        length = self.integer(8, f"the length of {what}")
        if length > limit:
            raise self.error(f"{what} is {length} bytes long; supported: at most {limit}")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not valid UTF-8: {error.reason}") from error

    # ------------------------------------------------------------ the whole

    def parse(self) -> tuple[int, dict[str, object], dict[str, TensorInfo]]:
        magic = self.take(4, "the magic number")
        if magic != MAGIC:
            raise ModelError(f"{self.path} is not a GGUF file: it starts with {magic!r}, not {MAGIC!r}")
        version = self.integer(4, "the version")
        if version not in VERSIONS:
            if version & 0xFFFF == 0:
                raise ModelError(f"{self.path} is a big-endian GGUF file; supported: little-endian")
            raise ModelError(
                f"{self.path} has GGUF version {version}; supported: {VERSIONS[0]} and {VERSIONS[1]}"
            )
        num_tensors = self.count(MAX_TENSORS, 8 + 4 + 8 + 4 + 8, "tensors")
        num_keys = self.count(MAX_KEYS, 8 + 4 + 1, "metadata keys")
        metadata = self.metadata(num_keys)
        records = [self.tensor_record() for _ in range(num_tensors)]
        return version, metadata, self.place(records)

    def count(self, limit: int, bytes_each: int, what: str) -> int:
        found = self.integer(8, f"the number of {what}")
        if found > limit:
            raise self.error(f"{found} {what}; supported: at most {limit}")
        self.need_room(found * bytes_each, f"{found} {what}")
        return found

    def need_room(self, count: int, what: str) -> None:
        """Check that the file can still hold `count` bytes, without reading them."""
        left = self.limit - self.position
        if count > left:
            raise self.error(f"{what} need at least {count} bytes and there is room for {left}: damaged")

    # ------------------------------------------------------------ metadata

    def metadata(self, num_keys: int) -> dict[str, object]:
        found: dict[str, object] = {}
        for _ in range(num_keys):
            key = self.text(MAX_KEY_BYTES, "a metadata key")
            if key in found:
                raise self.error(f"metadata key {key!r} appears twice")
            found[key] = self.value(self.integer(4, f"the type of {key!r}"), key, 0)
        alignment = found.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.error(
                f"general.alignment is {short(alignment)}; supported: powers of two up to {MAX_ALIGNMENT}"
            )
        self.alignment = alignment
        return found

    def value(self, kind: int, key: str, depth: int) -> object:
        if kind in SCALARS:
            return self.scalars(kind, 1, key)[0]
        if kind == STRING:
            return self.text(MAX_STRING_BYTES, f"the value of {key!r}")
        if kind == ARRAY:
            return self.array(key, depth + 1)
        names = ", ".join(f"{number} {name}" for number, (name, _) in SCALARS.items())
        raise self.error(f"{key!r} has metadata type {kind}; supported: {names}, 8 string, 9 array")

    def array(self, key: str, depth: int) -> list[object]:
        if depth > MAX_ARRAY_DEPTH:
            raise self.error(f"{key!r} nests arrays more than {MAX_ARRAY_DEPTH} deep")
        kind = self.integer(4, f"the element type of {key!r}")
        length = self.integer(8, f"the length of {key!r}")
        self.elements += length
        if self.elements > MAX_ARRAY_ELEMENTS:
            raise self.error(
                f"{key!r} has {length} elements; supported: at most {MAX_ARRAY_ELEMENTS} in all arrays"
            )
        if kind in SCALARS:
            return self.scalars(kind, length, key)
        smallest = {STRING: 8, ARRAY: 12}.get(kind, 1)
        self.need_room(length * smallest, f"the {length} elements of {key!r}")
        self.nested += length if kind == ARRAY else 0
        if self.nested > MAX_NESTED_ARRAYS:
            raise self.error(f"{key!r} holds {self.nested} arrays; supported: at most {MAX_NESTED_ARRAYS}")
        if kind == STRING:
            return self.string_array(length, key)
        return [self.value(kind, key, depth) for _ in range(length)]

    def scalars(self, kind: int, length: int, key: str) -> list[object]:
        dtype = np.dtype(SCALARS[kind][1])
        values = np.frombuffer(self.take(length * dtype.itemsize, f"the value of {key!r}"), dtype)
        if kind != BOOL:
            return list[object](values.tolist())
        if length and values.max() > 1:
            raise self.error(f"{key!r} has a bool that is {values.max()}; supported: 0 and 1")
        return list[object](values.astype(np.bool_).tolist())

    def string_array(self, length: int, key: str) -> list[object]:
        """`length` strings: in bulk where they allow it, else one by one."""
        if length >= _BULK_FROM:
            end = min(self.position + _BULK_BYTES_EACH * length, self.limit)
            if end > len(self.data):
                self.grow(end)
            found = _strings_in_bulk(np.frombuffer(self.data, np.uint8)[self.position : end], length)
            if found is not None:
                texts, used = found
                self.position += used
                return list[object](texts)
        return self.strings_one_by_one(length, key)

    def strings_one_by_one(self, length: int, key: str) -> list[object]:
        """What is not regular. A tight loop: a hostile file may take it millions of times."""
        texts: list[object] = []
        unpack = _UINT64.unpack_from
        while len(texts) < length:
            data, end = self.data, len(self.data) - 8
            position = self.position
            try:
                while position <= end and len(texts) < length:
                    stop = position + 8 + unpack(data, position)[0]
                    if stop > end:
                        break
                    texts.append(data[position + 8 : stop].decode())
                    position = stop
            except UnicodeDecodeError:
                pass
            self.position = position
            if len(texts) < length:  # near the end of what is read so far, or wrong: with all checks
                texts.append(self.text(MAX_STRING_BYTES, f"element {len(texts)} of {key!r}"))
        return texts

    # ------------------------------------------------------------ tensors

    def tensor_record(self) -> TensorInfo:
        """One record; `offset` still counts from the start of the data."""
        name = self.text(MAX_NAME_BYTES, "a tensor name")
        num_dims = self.integer(4, f"the number of dimensions of {name!r}")
        if not 1 <= num_dims <= MAX_DIMS:
            raise self.error(f"tensor {name!r} has {num_dims} dimensions; supported: 1 to {MAX_DIMS}")
        dims = struct.unpack(f"<{num_dims}Q", self.take(8 * num_dims, f"the dimensions of {name!r}"))
        shape = tuple(reversed(dims))
        kind = self.integer(4, f"the type of {name!r}")
        offset = self.integer(8, f"the offset of {name!r}")
        fmt = _FORMAT_OF_TYPE.get(kind)
        if fmt is None:
            found = UNSUPPORTED_TYPES.get(kind, "unknown")
            raise self.error(f"tensor {name!r} has type {kind} ({found}); supported: {', '.join(FORMATS)}")
        if min(shape) < 1:
            raise self.error(f"tensor {name!r} has shape {list(shape)}; every dimension must be at least 1")
        if shape[-1] % fmt.block_elements:
            raise self.error(
                f"tensor {name!r} is {fmt.name} with rows of {shape[-1]} weights; supported: multiples of "
                f"{fmt.block_elements}"
            )
        # Python's integers don't overflow, so the product is what the file says, however large.
        nbytes = math.prod(shape[:-1]) * fmt.row_bytes(shape[-1])
        if nbytes > self.size:
            raise self.error(
                f"tensor {name!r} of shape {list(shape)} in {fmt.name} takes {nbytes} bytes and the whole "
                f"file has {self.size}: truncated or damaged"
            )
        return TensorInfo(name, fmt.name, shape, offset, nbytes)

    def place(self, records: list[TensorInfo]) -> dict[str, TensorInfo]:
        """Check every tensor's place against the file and the other tensors; make offsets absolute."""
        base = -(-self.position // self.alignment) * self.alignment
        tensors: dict[str, TensorInfo] = {}
        for record in records:
            if record.name in tensors:
                raise self.error(f"tensor {record.name!r} appears twice")
            if record.offset % self.alignment:
                raise self.error(
                    f"tensor {record.name!r} lies at offset {record.offset}, not a multiple of the alignment "
                    f"{self.alignment}"
                )
            end = base + record.offset + record.nbytes
            if end > self.size:
                raise self.error(
                    f"tensor {record.name!r} ends at byte {end} and the file at {self.size}: "
                    "truncated or damaged"
                )
            tensors[record.name] = replace(record, offset=base + record.offset)
        in_order = sorted(tensors.values(), key=lambda info: info.offset)
        for first, second in pairwise(in_order):
            if first.offset + first.nbytes > second.offset:
                raise self.error(f"tensors {first.name!r} and {second.name!r} overlap")
        return tensors


def _strings_in_bulk(window: NDArray[np.uint8], length: int) -> tuple[list[str], int] | None:
    """Parse `length` strings at the start of `window`; (texts, bytes used), or None where that is not safe.

    A string shorter than 256 bytes is its length in one byte, seven zero bytes, and its text. If no text
    holds a zero byte and none is empty, the runs of seven zeros are exactly the lengths' upper bytes, and a
    length is where a run starts. That this holds is then checked for every string at once: each must end
    where the next one's length stands. What is left after dropping the zeros is one text, decoded and split
    in one go: about a fifth of the time of a loop.
    """
    zero = window == 0
    two = zero[:-1] & zero[1:]
    four = two[:-2] & two[2:]
    seven = four[:-3] & four[3:]
    starts = np.flatnonzero(seven)[:length] - 1
    if len(starts) < length or starts[0] != 0:
        return None
    ends = starts + 8 + window[starts]
    used = int(ends[-1])
    if used > len(window) or (ends[:-1] != starts[1:]).any():
        return None
    keep = np.ones(used, np.bool_)
    for i in range(1, 8):
        keep[starts + i] = False
    texts = window[:used].copy()
    texts[starts] = 0
    try:
        pieces = texts[keep].tobytes().decode().split("\0")
    except UnicodeDecodeError:
        return None  # one by one, to say which
    if len(pieces) != length + 1:
        return None
    del pieces[0]
    return pieces, used


def short(value: object) -> str:
    """A value for an error message, cut to a readable length."""
    text = repr(value[:64] if isinstance(value, (str, list, tuple)) else value)
    return text if len(text) <= 80 else text[:77] + "..."
