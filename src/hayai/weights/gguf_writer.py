"""Writes GGUF files: any metadata and tensors, and whole random models of a given shape and format.

For tests, benches and fuzzing; `encode_gguf` is the exact reverse of gguf_reader.py.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hayai.config import ModelConfig
from hayai.errors import ModelError
from hayai.formats import FORMATS, QuantTensor, get_format
from hayai.weights.gguf_reader import ARRAY, BOOL, DEFAULT_ALIGNMENT, MAGIC, SCALARS, STRING, short

_TYPE_OF_NAME = {name: number for number, (name, _) in SCALARS.items()} | {"string": STRING, "array": ARRAY}


@dataclass(frozen=True)
class Typed:
    """A metadata value with its GGUF type spelled out ('uint8', 'float64' ...); a list is an array of it."""

    kind: str
    value: object


def encode_gguf(
    metadata: Mapping[str, object],
    tensors: Mapping[str, QuantTensor],
    *,
    version: int = 3,
    alignment: int = DEFAULT_ALIGNMENT,
) -> bytes:
    """The bytes of a GGUF file.

    Values of metadata are bool, int (uint32, else int32, uint64 or int64, the first that holds it), float
    (float32), str, a list of one of these, or `Typed`. ModelError: a value of another kind.
    """
    head = bytearray(MAGIC)
    if alignment != DEFAULT_ALIGNMENT:
        metadata = {**metadata, "general.alignment": alignment}
    head += struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, payload = _encode_value(value)
        head += _encode_string(key) + struct.pack("<I", kind) + payload
    body = bytearray()
    for name, tensor in tensors.items():
        body += bytes(-len(body) % alignment)
        dims = tuple(reversed(tensor.shape))
        head += _encode_string(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        head += struct.pack("<IQ", FORMATS[tensor.format].ggml_type, len(body))
        body += tensor.data.tobytes()
    return bytes(head) + bytes(-len(head) % alignment) + bytes(body)


def write_gguf(
    path: str | os.PathLike[str], metadata: Mapping[str, object], tensors: Mapping[str, QuantTensor]
) -> Path:
    """Write `encode_gguf` to a file and return its path."""
    Path(path).write_bytes(encode_gguf(metadata, tensors))
    return Path(path)


def _encode_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _encode_value(value: object) -> tuple[int, bytes]:
    """(type number, bytes after the type)."""
    if isinstance(value, Typed):
        return _encode_typed(_TYPE_OF_NAME[value.kind], value.value)
    if isinstance(value, (list, tuple)):
        return _encode_typed(_kind_of_all(value), value)
    return _encode_typed(_kind_of(value), value)


def _encode_typed(kind: int, value: object) -> tuple[int, bytes]:
    if isinstance(value, (list, tuple)):
        if kind == ARRAY:
            data = b"".join(_encode_value(v)[1] for v in value)
        elif kind == STRING:
            data = b"".join(_encode_string(str(v)) for v in value)
        else:
            data = np.asarray(value).astype(SCALARS[kind][1]).tobytes()
        return ARRAY, struct.pack("<IQ", kind, len(value)) + data
    if kind == STRING:
        return STRING, _encode_string(str(value))
    return kind, np.asarray(value).astype(SCALARS[kind][1]).tobytes()


def _kind_of(value: object) -> int:
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, str):
        return STRING
    if isinstance(value, float):
        return _TYPE_OF_NAME["float32"]
    if isinstance(value, int):
        for name in ("uint32", "int32", "uint64", "int64"):
            limits = np.iinfo(SCALARS[_TYPE_OF_NAME[name]][1])
            if limits.min <= value <= limits.max:
                return _TYPE_OF_NAME[name]
    raise ModelError(
        f"can't write {short(value)} as metadata; supported: bool, int, float, str, lists of one"
    )


def _is_array(value: object) -> bool:
    return isinstance(value.value if isinstance(value, Typed) else value, (list, tuple))


def _kind_of_all(values: Sequence[object]) -> int:
    """The one kind that holds all elements; an empty list counts as strings."""
    if all(_is_array(v) for v in values) and values:
        return ARRAY
    if all(type(v) is int for v in values) and values:
        numbers = [v for v in values if isinstance(v, int)]
        low, high = _kind_of(min(numbers)), _kind_of(max(numbers))
        return low if min(numbers) < 0 else high
    kinds = {_kind_of(v) for v in values} or {STRING}
    if len(kinds) > 1:
        raise ModelError(f"can't write a list of mixed kinds: {short(list(values[:8]))}")
    return kinds.pop()


# ---------------------------------------------------------------- random models


def llama_metadata(config: ModelConfig, name: str = "llama") -> dict[str, object]:
    """The metadata keys that a converter writes for a dense model of this shape, without a vocabulary."""
    keys: dict[str, object] = {
        "vocab_size": config.vocab_size,
        "block_count": config.num_layers,
        "context_length": config.context_length,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.ffn_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": config.rope.rotary_dim or config.head_dim,
        "rope.freq_base": config.rope.theta,
    }
    if config.rope.scaling_kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope.factor}
    return {"general.architecture": name} | {f"{name}.{key}": value for key, value in keys.items()}


def random_llama(config: ModelConfig, format: str = "f32", seed: int = 0) -> dict[str, QuantTensor]:
    """Tensors of a dense model of this shape: matrices in `format` (float32 where its blocks don't fit a
    row), vectors in float32, values of a size that keeps activations near 1."""
    rng = np.random.default_rng(seed)
    fmt = get_format(format)

    def matrix(rows: int, cols: int) -> QuantTensor:
        values = rng.standard_normal((rows, cols), np.float32) / np.float32(cols**0.5)
        return QuantTensor.from_float(values, "f32" if cols % fmt.block_elements else format)

    def vector(length: int, mean: float) -> QuantTensor:
        values = mean + 0.1 * rng.standard_normal(length, np.float32)
        return QuantTensor.from_float(values, "f32")

    hidden, ffn = config.hidden_size, config.ffn_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    tensors = {
        "token_embd.weight": matrix(config.vocab_size, hidden),
        "output_norm.weight": vector(hidden, 1.0),
    }
    if not config.tied_head:
        tensors["output.weight"] = matrix(config.vocab_size, hidden)
    if config.rope.scaling_kind == "factors":
        values = 1 + rng.random((config.rope.rotary_dim or config.head_dim) // 2, np.float32)
        tensors["rope_freqs.weight"] = QuantTensor.from_float(values, "f32")
    for layer in range(config.num_layers):
        parts = {
            "attn_norm.weight": vector(hidden, 1.0),
            "attn_q.weight": matrix(q_rows, hidden),
            "attn_k.weight": matrix(kv_rows, hidden),
            "attn_v.weight": matrix(kv_rows, hidden),
            "attn_output.weight": matrix(hidden, q_rows),
            "ffn_norm.weight": vector(hidden, 1.0),
            "ffn_gate.weight": matrix(ffn, hidden),
            "ffn_up.weight": matrix(ffn, hidden),
            "ffn_down.weight": matrix(hidden, ffn),
        }
        if config.attention_bias:
            rows = {"q": q_rows, "k": kv_rows, "v": kv_rows}
            parts |= {f"attn_{part}.bias": vector(count, 0.0) for part, count in rows.items()}
        tensors |= {f"blk.{layer}.{part}": tensor for part, tensor in parts.items()}
    return tensors
