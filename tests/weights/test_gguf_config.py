"""From GGUF metadata to a normalised config, and the refusals on the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hayai.config import ModelConfig, RopeConfig
from hayai.errors import ModelError
from hayai.formats import QuantTensor
from hayai.weights.gguf import GgufFile, model_config
from hayai.weights.gguf_writer import llama_metadata, random_llama, write_gguf

TINY = ModelConfig(
    architecture="llama", vocab_size=40, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=8, ffn_size=48, context_length=128, norm_eps=0.5**20,
    rope=RopeConfig(theta=10000.0, rotary_dim=8),
)  # fmt: skip


class Draft:
    """A tiny model that a test changes before it is written and read back."""

    def __init__(self, folder: Path, config: ModelConfig = TINY) -> None:
        self.path = folder / "tiny.gguf"
        self.metadata = llama_metadata(config)
        self.tensors = random_llama(config)

    def config(self) -> ModelConfig:
        with GgufFile(write_gguf(self.path, self.metadata, self.tensors)) as file:
            return model_config(file)

    def fails(self, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            self.config()


@pytest.fixture
def draft(tmp_path: Path) -> Draft:
    return Draft(tmp_path)


def vector(*values: float) -> QuantTensor:
    return QuantTensor.from_float(np.array(values), "f32")


@pytest.mark.model
def test_default_model(default_model: Path) -> None:
    with GgufFile(default_model) as file:
        config = model_config(file)
    assert config == ModelConfig(
        architecture="llama", vocab_size=49152, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3,
        head_dim=64, ffn_size=1536, context_length=8192, norm_eps=float(np.float32(1e-5)),
        rope=RopeConfig(theta=100000.0, rotary_dim=64, interleaved=True), tied_head=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, tied_head=True),
        replace(TINY, attention_bias=True, num_kv_heads=4),
        replace(TINY, head_dim=16, rope=RopeConfig(theta=500000.0, rotary_dim=8)),
        replace(TINY, num_heads=3, num_kv_heads=1),
        replace(TINY, rope=RopeConfig(rotary_dim=8, scaling_kind="linear", factor=4.0)),
        replace(TINY, rope=RopeConfig(rotary_dim=8, scaling_kind="factors")),
    ],
    ids=["plain", "tied", "bias", "wide heads, partial rope", "odd heads", "linear", "factors"],
)
def test_what_is_written_is_read_back(tmp_path: Path, config: ModelConfig) -> None:
    assert Draft(tmp_path, config).config() == config


def test_defaults_of_missing_keys(draft: Draft) -> None:
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base",
                "vocab_size"):  # fmt: skip
        del draft.metadata[f"llama.{key}"]
    assert draft.config() == TINY
    draft.metadata["llama.attention.head_count_kv"] = [2, 2]  # one per layer
    assert draft.config() == TINY
    draft.metadata["llama.rope.scale_linear"] = 2.0  # the key of older files
    assert draft.config().rope == RopeConfig(rotary_dim=8, scaling_kind="linear", factor=2.0)
    draft.metadata["llama.rope.scaling.type"] = "none"
    assert draft.config() == TINY


def test_kv_heads_default_to_all_heads(tmp_path: Path) -> None:
    draft = Draft(tmp_path, replace(TINY, num_kv_heads=4))
    del draft.metadata["llama.attention.head_count_kv"]
    assert draft.config().num_kv_heads == 4


@pytest.mark.parametrize("found", [None, "mamba", 5, "llama\n"])
def test_unknown_architecture_names_both(draft: Draft, found: object) -> None:
    draft.metadata["general.architecture"] = found
    if found is None:
        del draft.metadata["general.architecture"]
    draft.fails(rf"architecture is {found!r}; supported in GGUF files: llama".replace("\\", "\\\\"))


BAD_VALUES: list[tuple[str, object, str]] = [
    ("block_count", 0, "block_count is 0; supported: one integer from 1"),
    ("block_count", 3, "block_count is 3, and there are tensors of 2 layers"),
    ("block_count", 1, "block_count is 1, and there are tensors of 2 layers"),
    ("block_count", (1 << 32) - 1, "block_count is 4294967295; supported"),
    ("block_count", "2", "block_count is '2'"),
    ("block_count", True, "block_count is True"),
    ("embedding_length", 64, r"'token_embd.weight' has shape \[40, 32\]; the metadata ask for \[40, 64\]"),
    ("embedding_length", 0, "embedding_length is 0"),
    ("embedding_length", 16, r"'token_embd.weight' has shape \[40, 32\]; the metadata ask for \[40, 16\]"),
    ("attention.head_count", 0, "head_count is 0"),
    ("attention.head_count", [4, 2], r"head_count is \[4, 2\]; supported: one integer"),
    ("attention.head_count", 6, r"'blk.0.attn_q.weight' has shape"),
    ("attention.head_count_kv", 3, "4 attention heads can't be shared out to 3 kv heads"),
    ("attention.head_count_kv", 8, "head_count_kv is 8; supported: one integer from 1 to 4"),
    ("attention.head_count_kv", 1, r"'blk.0.attn_k.weight' has shape \[16, 32\]; .* \[8, 32\]"),
    ("attention.key_length", 16, "key length 16 and value length 8 differ"),
    ("attention.key_length", 1 << 30, "key_length is 1073741824; supported: one integer from 1 to 4096"),
    ("feed_forward_length", 47, r"'blk.0.ffn_gate.weight' has shape \[48, 32\]; .* \[47, 32\]"),
    ("feed_forward_length", -1, "feed_forward_length is -1"),
    ("context_length", 0, "context_length is 0"),
    ("context_length", 1 << 31, "context_length is 2147483648; supported: one integer from 1 to 16777216"),
    ("context_length", 12.5, "context_length is 12.5"),
    ("attention.layer_norm_rms_epsilon", 0.0, "rms_epsilon is 0.0; supported: a finite number above zero"),
    ("attention.layer_norm_rms_epsilon", float("nan"), "rms_epsilon is nan"),
    ("attention.layer_norm_rms_epsilon", "x", "rms_epsilon is 'x'"),
    ("rope.freq_base", float("inf"), "freq_base is inf"),
    ("rope.freq_base", -1.0, "freq_base is -1.0"),
    ("rope.dimension_count", 7, "rope.dimension_count is 7; supported: even"),
    ("rope.dimension_count", 16, "rope.dimension_count is 16; supported: one integer from 2 to 8"),
    ("rope.scaling.type", "yarn", "rope scaling is 'yarn'; supported: none, linear"),
    ("expert_count", 8, "expert_count is 8; supported: 0"),
    ("attention.causal", False, "attention.causal is False; supported: True"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD_VALUES)
def test_bad_value_is_a_clear_error(draft: Draft, key: str, value: object, message: str) -> None:
    draft.metadata[f"llama.{key}"] = value
    draft.fails(message)


@pytest.mark.parametrize(
    "key",
    ["block_count", "embedding_length", "attention.head_count", "feed_forward_length", "context_length",
     "attention.layer_norm_rms_epsilon"],
)  # fmt: skip
def test_missing_key_is_named(draft: Draft, key: str) -> None:
    del draft.metadata[f"llama.{key}"]
    draft.fails(rf"llama.{key} is None")


@pytest.mark.parametrize("name", ["token_embd.weight", "output_norm.weight", "blk.1.attn_v.weight"])
def test_missing_tensor_is_named(draft: Draft, name: str) -> None:
    del draft.tensors[name]
    draft.fails(f"tensor '{name}' is missing")


def test_tensor_of_another_shape_is_named(draft: Draft) -> None:
    draft.tensors["blk.1.ffn_norm.weight"] = vector(*range(31))
    draft.fails(r"'blk.1.ffn_norm.weight' has shape \[31\]; the metadata ask for \[32\]")


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q_norm.weight", "blk.0.attn_output.bias", "cls.weight", "blk.00.attn_q.weight"]
)
def test_tensor_that_the_plan_would_not_use_is_refused(draft: Draft, name: str) -> None:
    """Running such a model without the tensor would be wrong without a word."""
    draft.tensors[name] = vector(1.0)
    draft.fails(f"tensor '{name}' is not part of a llama model that is supported")


def test_biases_in_some_layers_only(tmp_path: Path) -> None:
    draft = Draft(tmp_path, replace(TINY, attention_bias=True))
    first = {n: t for n, t in draft.tensors.items() if n.startswith("blk.0.") and n.endswith(".bias")}
    for name in first:
        del draft.tensors[name]
    draft.fails("no bias in layer 0; supported: biases in all or none")
    draft.tensors |= first
    del draft.tensors["blk.1.attn_k.bias"]
    draft.fails("tensor 'blk.1.attn_k.bias' is missing")


def test_embedding_must_be_a_matrix(draft: Draft) -> None:
    draft.tensors["token_embd.weight"] = vector(*range(32))
    draft.fails(r"'token_embd.weight' has shape \[32\]; supported: 2 dimensions")


def test_vocabulary_larger_than_embedding(draft: Draft) -> None:
    draft.metadata["tokenizer.ggml.tokens"] = [f"t{i}" for i in range(41)]
    draft.fails("the vocabulary has 41 tokens and the embedding 40 rows")
    draft.metadata["tokenizer.ggml.tokens"] = [f"t{i}" for i in range(39)]  # padded embedding
    assert draft.config() == TINY


def test_rope_factors_and_a_factor(tmp_path: Path) -> None:
    draft = Draft(tmp_path, replace(TINY, rope=RopeConfig(rotary_dim=8, scaling_kind="factors")))
    draft.metadata["llama.rope.scaling.factor"] = 8.0
    draft.fails("both a rope scaling factor and a rope_freqs tensor")
    del draft.metadata["llama.rope.scaling.factor"]
    draft.tensors["rope_freqs.weight"] = vector(1.0)
    draft.fails(r"'rope_freqs.weight' has shape \[1\]; the metadata ask for \[4\]")


def test_heads_that_do_not_divide_the_width(draft: Draft) -> None:
    draft.metadata["llama.attention.head_count"] = 3
    draft.metadata["llama.attention.head_count_kv"] = 1
    del draft.metadata["llama.attention.key_length"]
    draft.fails("embedding length 32 is not a multiple of 3 heads, and no key_length")
