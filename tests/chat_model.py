"""A model that is tiny, random, and can chat: the default model's vocabulary and template on two layers."""

from __future__ import annotations

from pathlib import Path

from hayai.config import ModelConfig, RopeConfig
from hayai.weights.gguf import GgufFile
from hayai.weights.gguf_writer import llama_metadata, random_llama, write_gguf

CONTEXT = 512


def write_chat_model(default_model: Path, path: Path) -> Path:
    """Write it to `path` and return that. Its context is CONTEXT tokens."""
    with GgufFile(default_model) as file:
        text = {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
        vocab_size = file.tensors["token_embd.weight"].shape[0]
    config = ModelConfig(
        architecture="llama",
        vocab_size=vocab_size,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        ffn_size=64,
        context_length=CONTEXT,
        norm_eps=1e-5,
        rope=RopeConfig(rotary_dim=16),
        tied_head=True,
    )
    return write_gguf(path, llama_metadata(config) | text, random_llama(config, "q8_0"))
