"""GGUF: the container (`GgufFile`) and what its metadata say about the model (`model_config`).

The reader itself, which trusts nothing, is gguf_reader.py. Here the metadata of one architecture become a
normalised `ModelConfig`, checked against the tensors: a size that reaches a plan is a size that a tensor has,
so no number in a file can ask for more than the file holds. To add an architecture, add a row to
`ARCHITECTURES`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from hayai.config import ModelConfig, RopeConfig
from hayai.errors import ModelError
from hayai.weights.gguf_reader import GgufFile, TensorInfo, short

__all__ = ["ARCHITECTURES", "Architecture", "GgufFile", "TensorInfo", "model_config"]

MAX_CONTEXT = 1 << 24
MAX_HEADS = 1 << 14
MAX_HEAD_DIM = 1 << 12
_MAX_SIZE = 1 << 31
"""Of widths that are then compared with the tensors."""


@dataclass(frozen=True)
class Architecture:
    """One row: how files of an architecture are read.

    interleaved: pairing of rotary dims, as the file's q and k rows are ordered. act: of the gated MLP.
    tensors, layer_tensors: the names (the latter after 'blk.N.') that the plan of this family uses; a file
    with any other tensor computes something else, and is refused rather than run wrongly. ignored: names that
    converters write and that change nothing.
    """

    interleaved: bool
    act: str
    tensors: frozenset[str]
    layer_tensors: frozenset[str]
    ignored: frozenset[str] = frozenset()


_DENSE_LAYER = frozenset(
    f"{part}.weight"
    for part in (
        "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output",
        "ffn_norm", "ffn_gate", "ffn_up", "ffn_down",
    )
)  # fmt: skip
_QKV_BIAS = frozenset({"attn_q.bias", "attn_k.bias", "attn_v.bias"})
_OUTER = frozenset({"token_embd.weight", "output_norm.weight", "output.weight", "rope_freqs.weight"})

ARCHITECTURES: Mapping[str, Architecture] = {
    # Converters to GGUF permute Llama's q and k rows so that rotary pairs are neighbours.
    "llama": Architecture(
        True, "silu", _OUTER, _DENSE_LAYER | _QKV_BIAS, frozenset({"attn_rot_embd.weight"})
    ),
}
"""Name in `general.architecture` -> how it is read."""


def model_config(file: GgufFile) -> ModelConfig:
    """The model's normalised shape. ModelError: an architecture or a feature that is not supported, a value
    that is missing or makes no sense, or sizes that contradict the tensors."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise ModelError(f"{file.path}: architecture is {short(name)}; supported in GGUF files: {supported}")
    return _dense_config(file, _Keys(file, name), ARCHITECTURES[name])


# ---------------------------------------------------------------- typed access to metadata


@dataclass(frozen=True)
class _Keys:
    """Metadata of one architecture. `key` leaves out the architecture's prefix."""

    file: GgufFile
    arch: str

    def error(self, message: str) -> ModelError:
        return ModelError(f"{self.file.path}: {message}")

    def get(self, key: str) -> object:
        return self.file.metadata.get(f"{self.arch}.{key}")

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """An integer in [low, high]; a list of equal ones (a value per layer) counts as one."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, list) and value and all(type(v) is int and v == value[0] for v in value):
            value = value[0]
        if type(value) is not int or not low <= value <= high:
            raise self.error(
                f"{self.arch}.{key} is {short(value)}; supported: one integer from {low} to {high}"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float):
            raise self.error(f"{self.arch}.{key} is {short(value)}; supported: a number above zero")
        assert isinstance(value, (int, float))
        if not 0 < value < math.inf:
            raise self.error(f"{self.arch}.{key} is {value}; supported: a finite number above zero")
        return float(value)

    def tensor(self, name: str) -> TensorInfo:
        info = self.file.tensors.get(name)
        if info is None:
            raise self.error(f"tensor {name!r} is missing ({len(self.file.tensors)} tensors found)")
        return info

    def expect(self, name: str, *shape: int) -> None:
        """Check a tensor's shape against what the metadata say it must be."""
        found = self.tensor(name).shape
        if found != shape:
            raise self.error(f"tensor {name!r} has shape {list(found)}; the metadata ask for {list(shape)}")


# ---------------------------------------------------------------- the dense decoder


def _dense_config(file: GgufFile, keys: _Keys, arch: Architecture) -> ModelConfig:
    """Decoders of Llama's wiring: grouped-query attention and a gated MLP in every layer."""
    num_layers = _check_tensor_names(keys, arch)
    embedding = keys.tensor("token_embd.weight")
    if len(embedding.shape) != 2:
        raise keys.error(
            f"tensor 'token_embd.weight' has shape {list(embedding.shape)}; supported: 2 dimensions"
        )
    vocab_size = embedding.shape[0]
    hidden = keys.integer("embedding_length", 1, _MAX_SIZE)
    heads = keys.integer("attention.head_count", 1, MAX_HEADS)
    kv_heads = keys.integer("attention.head_count_kv", 1, heads, heads)
    if heads % kv_heads:
        raise keys.error(f"{heads} attention heads can't be shared out to {kv_heads} kv heads")
    head_dim = _head_dim(keys, hidden, heads)
    ffn = keys.integer("feed_forward_length", 1, _MAX_SIZE)
    config = ModelConfig(
        architecture=keys.arch,
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=ffn,
        context_length=keys.integer("context_length", 1, MAX_CONTEXT),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope=_rope_config(keys, head_dim, arch.interleaved),
        act=arch.act,
        tied_head="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
    )
    _check_unsupported(keys)
    _check_vocabulary(keys, vocab_size)
    _check_shapes(keys, config)
    return config


def _head_dim(keys: _Keys, hidden: int, heads: int) -> int:
    default = hidden // heads if hidden % heads == 0 else None
    key_length = keys.get("attention.key_length")
    if key_length is None and default is None:
        raise keys.error(f"embedding length {hidden} is not a multiple of {heads} heads, and no key_length")
    head_dim = keys.integer("attention.key_length", 1, MAX_HEAD_DIM, default)
    if head_dim > MAX_HEAD_DIM:
        raise keys.error(f"a head has {head_dim} dimensions; supported: at most {MAX_HEAD_DIM}")
    value_dim = keys.integer("attention.value_length", 1, MAX_HEAD_DIM, head_dim)
    if value_dim != head_dim:
        raise keys.error(f"key length {head_dim} and value length {value_dim} differ; supported: equal ones")
    return head_dim


def _rope_config(keys: _Keys, head_dim: int, interleaved: bool) -> RopeConfig:
    rotary_dim = keys.integer("rope.dimension_count", 2, head_dim, head_dim)
    if rotary_dim % 2:
        raise keys.error(f"rope.dimension_count is {rotary_dim}; supported: even numbers")
    theta = keys.number("rope.freq_base", 10000.0)
    kind = keys.get("rope.scaling.type")
    # Older files give only a factor, which means linear scaling.
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    if kind not in (None, "none", "linear"):
        raise keys.error(f"rope scaling is {short(kind)}; supported: none, linear, and a rope_freqs tensor")
    scaled = kind != "none" and factor != 1.0
    if "rope_freqs.weight" in keys.file.tensors:
        if scaled:
            raise keys.error("both a rope scaling factor and a rope_freqs tensor; supported: one of them")
        keys.expect("rope_freqs.weight", rotary_dim // 2)
        return RopeConfig(theta, rotary_dim, interleaved, "factors")
    if scaled:
        return RopeConfig(theta, rotary_dim, interleaved, "linear", factor)
    return RopeConfig(theta, rotary_dim, interleaved)


# ---------------------------------------------------------------- checks


def _check_tensor_names(keys: _Keys, arch: Architecture) -> int:
    """Every tensor is one that the plan uses, every layer has some; returns the number of layers."""
    layers: set[int] = set()
    for name in keys.file.tensors:
        match = re.fullmatch(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)", name)
        if match is None:
            known = name in arch.tensors
        else:
            known = match[2] in arch.layer_tensors or match[2] in arch.ignored
            layers.add(int(match[1]))
        if not known:
            raise keys.error(f"tensor {name!r} is not part of a {keys.arch} model that is supported")
    num_layers = keys.integer("block_count", 1, max(len(keys.file.tensors), 1))
    if layers != set(range(num_layers)):
        raise keys.error(f"block_count is {num_layers}, and there are tensors of {len(layers)} layers")
    return num_layers


def _check_unsupported(keys: _Keys) -> None:
    """Features that a file may declare, that change the result, and that are not supported."""
    for key, neutral in (("expert_count", 0), ("attention.causal", True)):
        value = keys.get(key)
        if value is not None and value != neutral:
            raise keys.error(f"{keys.arch}.{key} is {short(value)}; supported: {neutral}")


def _check_vocabulary(keys: _Keys, rows: int) -> None:
    """A token that has no row in the embedding would be read from beyond it."""
    tokens = keys.file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > rows:
        raise keys.error(f"the vocabulary has {len(tokens)} tokens and the embedding {rows} rows")


def _check_shapes(keys: _Keys, config: ModelConfig) -> None:
    hidden, ffn = config.hidden_size, config.ffn_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    keys.expect("token_embd.weight", config.vocab_size, hidden)
    keys.expect("output_norm.weight", hidden)
    if not config.tied_head:
        keys.expect("output.weight", config.vocab_size, hidden)
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (hidden,),
        "attn_q.weight": (q_rows, hidden),
        "attn_k.weight": (kv_rows, hidden),
        "attn_v.weight": (kv_rows, hidden),
        "attn_output.weight": (hidden, q_rows),
        "ffn_norm.weight": (hidden,),
        "ffn_gate.weight": (ffn, hidden),
        "ffn_up.weight": (ffn, hidden),
        "ffn_down.weight": (hidden, ffn),
    }
    if config.attention_bias:
        shapes |= {"attn_q.bias": (q_rows,), "attn_k.bias": (kv_rows,), "attn_v.bias": (kv_rows,)}
    for layer in range(config.num_layers):
        for part, shape in shapes.items():
            keys.expect(f"blk.{layer}.{part}", *shape)
    if not config.attention_bias:
        stray = [name for name in keys.file.tensors if name.endswith(".bias")]
        if stray:
            raise keys.error(f"tensor {stray[0]!r}, but no bias in layer 0; supported: biases in all or none")
