"""Seeds and mutations for fuzzing the GGUF reader and what stands behind it.

Three kinds: of bytes (anywhere in a file), of fields (the counts, lengths, types and offsets that a reader
must not believe), and of structure (a well-formed file that says something else). The last kind gets past the
container and reaches the config, the tokenizer, the plan and the kernels.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np

from hayai.config import ModelConfig, RopeConfig
from hayai.errors import ModelError
from hayai.formats import FORMATS, QuantTensor
from hayai.weights.gguf_reader import SCALARS, GgufFile
from hayai.weights.gguf_writer import Typed, encode_gguf, llama_metadata, random_llama

TINY = ModelConfig(
    architecture="llama", vocab_size=288, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=8, ffn_size=64, context_length=64, norm_eps=1e-5, rope=RopeConfig(rotary_dim=8), tied_head=True,
)  # fmt: skip
WIDE = replace(
    TINY, hidden_size=256, num_layers=1, num_heads=4, num_kv_heads=1, head_dim=64, ffn_size=256,
    rope=RopeConfig(rotary_dim=64), tied_head=False,
)  # fmt: skip

NUMBERS = (
    0, 1, 2, 3, 7, 8, 31, 32, 33, 127, 128, 255, 256, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
    1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1,
)  # fmt: skip
"""Values at which a careless reader overflows or allocates."""


@dataclass(frozen=True)
class Seed:
    """A valid file, as bytes and as what it was made of."""

    name: str
    metadata: dict[str, object]
    tensors: dict[str, QuantTensor]
    data: bytes
    fields: tuple[tuple[int, int], ...]
    header_end: int


def make_seed(name: str, metadata: dict[str, object], tensors: dict[str, QuantTensor]) -> Seed:
    data = encode_gguf(metadata, tensors)
    fields, header_end = find_fields(data)
    return Seed(name, metadata, tensors, data, fields, header_end)


# ---------------------------------------------------------------- seeds


def vocabulary(size: int) -> dict[str, object]:
    """Metadata of a byte-level BPE vocabulary: 256 bytes, a few merges, special tokens, then fillers."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, *(m.replace(" ", "") for m in merges)]
    tokens += [f"<unused{i}>" for i in range(size - len(tokens))]
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens[:size],
        "tokenizer.ggml.token_type": Typed("int32", [3] * 3 + [1] * (size - 3)),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": template,
    }


def seeds(real_model: Path | None) -> list[Seed]:
    """Tiny models of every format and feature; and, where the default model is there, its real header over
    the smallest tensors that fit it."""
    found = [
        make_seed(name, llama_metadata(TINY) | vocabulary(TINY.vocab_size), random_llama(TINY, name))
        for name, fmt in FORMATS.items()
        if fmt.block_elements <= 32
    ]
    found += [
        make_seed(name, llama_metadata(WIDE), random_llama(WIDE, name))
        for name, fmt in FORMATS.items()
        if fmt.block_elements > 32
    ]
    scaled = replace(TINY, rope=RopeConfig(rotary_dim=8, scaling_kind="factors"), attention_bias=True)
    found.append(make_seed("factors, biases", llama_metadata(scaled), random_llama(scaled, "q8_0")))
    everything: dict[str, object] = {name: Typed(name, 1) for name, _ in SCALARS.values()}
    everything |= {f"{name}s": Typed(name, [1, 0]) for name, _ in SCALARS.values()}
    everything |= {"text": "é", "texts": ["a", "bc"] * 200, "nested": [[1], [2, 3]], "general.alignment": 64}
    found.append(make_seed("every type", everything, {"t": QuantTensor.from_float(np.ones((3, 5)), "f32")}))
    if real_model is not None:
        found.append(_real_seed(real_model))
    return found


def _real_seed(path: Path) -> Seed:
    with GgufFile(path) as file:
        metadata, rows = dict(file.metadata), file.tensors["token_embd.weight"].shape[0]
    small = replace(TINY, vocab_size=rows)
    metadata = {k: v for k, v in metadata.items() if not k.startswith("llama.")} | llama_metadata(small)
    metadata["tokenizer.ggml.token_type"] = Typed("int32", metadata["tokenizer.ggml.token_type"])
    return make_seed("real header", metadata, random_llama(small, "q4_1"))


def find_fields(data: bytes) -> tuple[tuple[tuple[int, int], ...], int]:
    """(offset, size) of every count, length, type, dimension and offset of a valid file's header, and the
    header's end. Of long arrays of strings only some lengths are listed."""
    fields: list[tuple[int, int]] = [(4, 4), (8, 8), (16, 8)]
    position = 24

    def integer(size: int, listed: bool = True) -> int:
        nonlocal position
        if listed:
            fields.append((position, size))
        position += size
        return int.from_bytes(data[position - size : position], "little")

    def skip_string(listed: bool = True) -> None:
        nonlocal position
        length = integer(8, listed)
        position += length

    def skip_value(kind: int) -> None:
        nonlocal position
        if kind == 8:
            skip_string()
        elif kind == 9:
            inner, length = integer(4), integer(8)
            if inner in SCALARS:
                position += length * np.dtype(SCALARS[inner][1]).itemsize
                return
            for i in range(length):
                skip_string(i < 20 or i % 500 == 0) if inner == 8 else skip_value(inner)
        else:
            fields.append((position, np.dtype(SCALARS[kind][1]).itemsize))
            position += fields[-1][1]

    num_tensors, num_keys = struct.unpack_from("<QQ", data, 8)
    for _ in range(num_keys):
        skip_string()
        skip_value(integer(4))
    for _ in range(num_tensors):
        skip_string()
        for _ in range(integer(4)):
            integer(8)
        integer(4)
        integer(8)
    return tuple(fields), position


# ---------------------------------------------------------------- mutations of bytes


def truncate(seed: Seed, rng: Random) -> bytes:
    end = rng.choice((seed.header_end + 64, len(seed.data)))
    return seed.data[: rng.randrange(min(end, len(seed.data)))]


def _somewhere(seed: Seed, rng: Random) -> int:
    """A byte of the header, most of the time."""
    return rng.randrange(seed.header_end if rng.random() < 0.85 else len(seed.data))


def flip_bits(seed: Seed, rng: Random) -> bytes:
    data = bytearray(seed.data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        data[_somewhere(seed, rng)] ^= 1 << rng.randrange(8)
    return bytes(data)


def set_bytes(seed: Seed, rng: Random) -> bytes:
    data = bytearray(seed.data)
    at, size = _somewhere(seed, rng), rng.choice((1, 2, 4, 8, 32))
    data[at : at + size] = rng.choice((b"\0", b"\xff", b"\x7f", rng.randbytes(1))) * size
    return bytes(data[: len(seed.data)])


def move_bytes(seed: Seed, rng: Random) -> bytes:
    """Insert, delete or repeat a run of bytes."""
    at, size = _somewhere(seed, rng), rng.choice((1, 2, 4, 8, 24, 100))
    source = _somewhere(seed, rng)
    piece = rng.choice((b"", rng.randbytes(size), seed.data[source : source + size]))
    return seed.data[:at] + piece + seed.data[at + rng.choice((0, size)) :]


def edit_fields(seed: Seed, rng: Random) -> bytes:
    data = bytearray(seed.data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, size = rng.choice(seed.fields)
        now = int.from_bytes(data[at : at + size], "little")
        near = (now + 1, now - 1, now * 2, now + 32, now ^ 32, len(data), len(data) - at, now << 32)
        value = rng.choice(near if rng.random() < 0.5 else NUMBERS)
        data[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(data)


def spoil_weights(seed: Seed, rng: Random) -> bytes:
    """Random bytes for weights: infinite and NaN scales reach the kernels."""
    data = bytearray(seed.data)
    for _ in range(rng.choice((1, 4, 64))):
        at, size = rng.randrange(seed.header_end, len(data)), rng.choice((1, 2, 32, 400))
        data[at : at + size] = rng.choice((b"\xff", b"\x7c", b"\0", rng.randbytes(1))) * size
    return bytes(data[: len(seed.data)])


# ---------------------------------------------------------------- mutations of structure


def change_metadata(seed: Seed, rng: Random) -> bytes:
    metadata = dict(seed.metadata)
    for _ in range(rng.choice((1, 1, 2, 4))):
        key = rng.choice(list(metadata))
        if rng.random() < 0.15:
            del metadata[key]
        else:
            metadata[key] = _other_value(metadata[key], rng)
        if not metadata:
            break
    return encode_gguf(metadata, seed.tensors)


def _other_value(value: object, rng: Random) -> object:
    kind, plain = (value.kind, value.value) if isinstance(value, Typed) else (None, value)
    if isinstance(plain, (list, tuple)) and plain and rng.random() < 0.8:
        items = list(plain)
        for _ in range(rng.choice((1, 3))):
            at = rng.randrange(len(items))
            items[at] = rng.choice((items[rng.randrange(len(items))], _other_item(items[at], rng)))
        cut = rng.choice((len(items), len(items), rng.randrange(len(items) + 1)))
        return Typed(kind, items[:cut]) if kind else items[:cut]
    return rng.choice(
        (
            rng.choice(NUMBERS), -1, 1 << 20, True, 0.0, float("nan"), float("inf"), -1.5, 1e-45, 3e38,
            "", "llama", "linear", "yarn", "gpt2", "llama-bpe", "x" * rng.choice((1, 300, 70000)), "\0",
            "日本語", [], [1, 2], ["a"], [[1]], _other_item(plain, rng),
        )
    )  # fmt: skip


def _other_item(value: object, rng: Random) -> object:
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return rng.choice(
            (value[:at], value + value, value[:at] + rng.choice("\0é {%\U0010ffff") + value[at:])
        )
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((value + 1, max(value - 1, 0), value * 2, value // 2, 0, 1, 2, 127))
    return value


def change_tensors(seed: Seed, rng: Random) -> bytes:
    tensors = dict(seed.tensors)
    for _ in range(rng.choice((1, 1, 2))):
        if not tensors:
            break
        name = rng.choice(list(tensors))
        tensor = tensors.pop(name)
        choice = rng.randrange(6)
        if choice == 1:
            tensors[
                rng.choice(("", "x", "blk.0.attn_q.bias", "output.weight", name + "x", "blk.7" + name))
            ] = tensor
        elif choice == 2:
            tensors[name] = (
                QuantTensor(tensor.format, (*tensor.shape, 1)[-4:], tensor.data)
                if (FORMATS[tensor.format].block_elements == 1 and tensor.data.shape[1] == 4)
                else QuantTensor(tensor.format, (1, *tensor.shape), tensor.data)
            )
        elif choice == 3:
            keep = rng.randrange(1, tensor.rows + 1)
            tensors[name] = QuantTensor(tensor.format, (keep, tensor.cols), tensor.data[:keep])
        elif choice >= 4:
            tensors[name] = _in_format(tensor, rng.choice(list(FORMATS)))
    return encode_gguf(seed.metadata, tensors)


def _in_format(tensor: QuantTensor, format: str) -> QuantTensor:
    """The tensor in another format, or as it is where its rows don't allow that."""
    try:
        return QuantTensor.from_float(np.nan_to_num(tensor.dequantize()), format)
    except ModelError:
        return tensor


def swap_tensors(seed: Seed, rng: Random) -> bytes:
    """Two tensors change places, the kind of mistake a converter makes."""
    tensors = dict(seed.tensors)
    first, second = rng.choice(list(tensors)), rng.choice(list(tensors))
    tensors[first], tensors[second] = tensors[second], tensors[first]
    return encode_gguf(seed.metadata, tensors, version=rng.choice((2, 3)))


def other_model(seed: Seed, rng: Random) -> bytes:
    """A sound model of an unusual shape, its tensors in any formats: sizes that kernels must pad."""
    kv_heads, head_dim = rng.choice((1, 1, 2, 3)), rng.choice((2, 3, 5, 8, 16, 20, 64, 80, 128, 256))
    config = ModelConfig(
        architecture="llama",
        vocab_size=rng.choice((1, 2, 7, 8, 9, 33, 288, 1000)),
        hidden_size=rng.choice((1, 2, 7, 31, 32, 33, 64, 96, 256, 288)),
        num_layers=rng.choice((1, 1, 2, 3)),
        num_heads=kv_heads * rng.choice((1, 1, 2, 3, 7)),
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=rng.choice((1, 3, 31, 32, 33, 64, 160, 256)),
        context_length=rng.choice((1, 3, 64, 1 << 20)),
        norm_eps=rng.choice((1e-6, 1e-5, 0.5)),
        rope=RopeConfig(
            theta=rng.choice((1.0, 10000.0, 1e6)),
            rotary_dim=2 * rng.randrange(1, head_dim // 2 + 1),
            scaling_kind=rng.choice((None, None, "linear", "factors")),
            factor=rng.choice((0.5, 8.0)),
        ),
        tied_head=rng.random() < 0.5,
        attention_bias=rng.random() < 0.3,
    )
    formats = [rng.choice(list(FORMATS)) for _ in range(rng.choice((1, 1, 3)))]
    tensors = {
        name: _in_format(tensor, rng.choice(formats))
        if len(tensor.shape) > 1 or rng.random() < 0.1
        else tensor
        for name, tensor in random_llama(config, seed=rng.randrange(1 << 30)).items()
    }
    return encode_gguf(llama_metadata(config), tensors)


Mutation = Callable[[Seed, Random], bytes]

MUTATIONS: dict[str, tuple[Mutation, int]] = {
    "truncate": (truncate, 2),
    "flip bits": (flip_bits, 3),
    "set bytes": (set_bytes, 2),
    "move bytes": (move_bytes, 2),
    "edit fields": (edit_fields, 5),
    "spoil weights": (spoil_weights, 1),
    "change metadata": (change_metadata, 4),
    "change tensors": (change_tensors, 2),
    "swap tensors": (swap_tensors, 1),
    "other model": (other_model, 3),
}
"""Name -> (mutation, how often)."""


def mutate(seed: Seed, rng: Random) -> tuple[str, bytes]:
    """One mutation, now and then a second one of the bytes of the first's result."""
    names = list(MUTATIONS)
    name = rng.choices(names, [weight for _, weight in MUTATIONS.values()])[0]
    try:
        data = MUTATIONS[name][0](seed, rng)
    except (ModelError, ValueError, TypeError, OverflowError):  # the writer can't write that
        name, data = "flip bits", flip_bits(seed, rng)
    if rng.random() < 0.1 and data:
        spoiled = bytearray(data)
        spoiled[rng.randrange(len(spoiled))] ^= 1 << rng.randrange(8)
        data = bytes(spoiled)
    return name, data
