"""Models that a claim may be about: named shapes, GGUF files, config files. Sizes only, no weights.

A shape becomes plans through the same model files that run it (models.registry), so the bytes and operations
of a claim are those of the engine's own plan.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hayai.bench.claims import tensor_format
from hayai.config import ModelConfig
from hayai.errors import ModelError
from hayai.formats import FORMATS
from hayai.models.registry import FAMILIES, SUPPORTED, build_plans
from hayai.plan.plan import Plan
from hayai.weights.gguf import GgufFile, model_config

TABLE = Path(__file__).with_name("claim_models.toml")
FIELDS = {field.name: field for field in dataclasses.fields(ModelConfig)}
REQUIRED = tuple(
    name
    for name, field in FIELDS.items()
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
)
SIZES_ONLY = {"norm_eps": 1e-5}
"""Fields that no count of bytes or operations depends on, where a shape leaves them out."""


MAX_SIZE = 1 << 31
LIMITS = {"num_layers": 4096, "num_experts": 16384, "num_dense_layers": 4096}
"""A plan has ops per layer and a name per expert: no file may ask for more of them than this."""


LATENT = ("glm_moe_dsa", "glm4_moe_lite")
LATENT_FIELDS = (
    "num_experts", "experts_per_token", "moe_ffn_size",
    "q_lora_rank", "kv_lora_rank", "qk_nope_dim", "qk_rope_dim", "value_dim",
)  # fmt: skip
INDEX_FIELDS = ("index_heads", "index_head_dim")
"""What latent attention with experts, and its sparse index, can't do without."""


@dataclass(frozen=True)
class ClaimModel:
    """A model to count. bits: per weight and slot as a file stores them; None = a precision must be named.

    max_context: up to which context the plan is the model's; None = up to its own context length.
    """

    name: str
    title: str
    source: str
    config: ModelConfig
    plans: Mapping[str, Plan]
    bits: Mapping[str, float] | None = None
    note: str = ""
    max_context: int | None = None


def shape_rows() -> dict[str, dict[str, Any]]:
    """Rows of claim_models.toml by name, those with a `base` filled up."""
    found: dict[str, dict[str, Any]] = {}
    for row in tomllib.loads(TABLE.read_text())["model"]:
        base = {
            k: v for k, v in found.get(row.get("base", ""), {}).items() if k not in ("note", "max_context")
        }
        found[row["name"]] = base | row
    return found


def find_model(text: str) -> ClaimModel:
    """By the name of a shape, or the path of a .gguf, a config.json or a .toml; else a ModelError."""
    if text in shape_rows():
        return named_model(text)
    path = Path(text)
    if path.suffix not in READERS:
        raise ModelError(
            f"{text!r} is no shape that is known: {', '.join(shape_rows())}; "
            f"and no file ending in {', '.join(READERS)}"
        )
    if not path.is_file():
        raise ModelError(f"{text}: there is no such file")
    return READERS[path.suffix](path)


@cache
def named_model(name: str) -> ClaimModel:
    """A shape of claim_models.toml. Built once per process: a plan with 20,000 experts takes a moment."""
    row = shape_rows()[name]
    config = config_from_fields(row, f"shape {name}")
    return ClaimModel(
        name, row["title"], row["source"], config, build_plans(config, "hf"),
        note=row.get("note", ""), max_context=row.get("max_context"),
    )  # fmt: skip


def config_from_fields(row: Mapping[str, Any], where: str) -> ModelConfig:
    """A ModelConfig from its own field names; keys that it does not have are left alone."""
    fields = SIZES_ONLY | {name: row[name] for name in FIELDS if name in row and name != "rope"}
    missing = [name for name in REQUIRED if name not in fields]
    if missing:
        raise ModelError(f"{where}: {', '.join(missing)} missing; see ModelConfig in src/hayai/config.py")
    for name, value in fields.items():
        if FIELDS[name].type != "int":
            continue
        low, high = int(name in REQUIRED), LIMITS.get(name, MAX_SIZE)
        if type(value) is not int or not low <= value <= high:
            raise ModelError(f"{where}: {name} is {value!r}; supported: an integer from {low} to {high}")
    if fields["architecture"] not in FAMILIES:
        raise ModelError(
            f"{where}: architecture {fields['architecture']!r} has no plan; supported: {', '.join(SUPPORTED)}"
        )
    config = ModelConfig(**fields)
    _check_parts(config, where)
    return config


def _check_parts(config: ModelConfig, where: str) -> None:
    """Sizes that a part of the model can't be counted without."""
    latent = config.architecture in LATENT
    wanted = LATENT_FIELDS + (INDEX_FIELDS if config.index_topk else ()) if latent else ()
    missing = [name for name in wanted if not getattr(config, name)]
    if missing:
        raise ModelError(f"{where}: {', '.join(missing)} missing; {config.architecture} needs them")
    if latent and config.experts_per_token > config.num_experts:
        raise ModelError(f"{where}: {config.experts_per_token} experts per token of {config.num_experts}")


# ---------------------------------------------------------------- files


def from_gguf(path: Path) -> ClaimModel:
    """A GGUF file: its shape, and the bits of its own formats."""
    with GgufFile(path) as file:
        config = model_config(file)
        plans = build_plans(config)
        bits = {
            name: slot_bits(tensor_format(plan, file.tensors, name))
            for plan in plans.values()
            for name in plan.slots
        }
    return ClaimModel(path.name, path.stem, "the file itself", config, plans, bits)


def slot_bits(name: str | None) -> float:
    """Bits per weight of a format; an optional slot that the file lacks has none."""
    return 0.0 if name is None else FORMATS[name].block_bytes * 8 / FORMATS[name].block_elements


def from_toml(path: Path) -> ClaimModel:
    """A table with the fields of ModelConfig, as the rows of claim_models.toml."""
    try:
        row = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not TOML: {error}") from None
    return _from_config(path, config_from_fields(row, str(path)))


def from_json(path: Path) -> ClaimModel:
    """A Hugging Face config.json."""
    try:
        row = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ModelError(f"{path}: a JSON {type(row).__name__}; supported: an object")
    return _from_config(path, config_from_fields(_hugging_face(row), str(path)))


def _from_config(path: Path, config: ModelConfig) -> ClaimModel:
    return ClaimModel(path.name, config.architecture, str(path.name), config, build_plans(config, "hf"))


READERS = {".gguf": from_gguf, ".json": from_json, ".toml": from_toml}

WIRED_ALIKE = {
    "mistral": "llama",
    "deepseek_v3": "glm4_moe_lite",
    "deepseek_v32": "glm_moe_dsa",
}
"""model_type of a config.json -> an architecture whose plan moves the same bytes."""

HF_NAMES: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size",),
    "num_layers": ("num_hidden_layers",),
    "num_heads": ("num_attention_heads",),
    "num_kv_heads": ("num_key_value_heads", "num_attention_heads"),
    "head_dim": ("head_dim",),
    "ffn_size": ("intermediate_size",),
    "context_length": ("max_position_embeddings",),
    "tied_head": ("tie_word_embeddings",),
    "attention_bias": ("attention_bias",),
    "num_experts": ("n_routed_experts",),
    "experts_per_token": ("num_experts_per_tok",),
    "num_shared_experts": ("n_shared_experts",),
    "moe_ffn_size": ("moe_intermediate_size",),
    "num_dense_layers": ("first_k_dense_replace",),
    "q_lora_rank": ("q_lora_rank",),
    "kv_lora_rank": ("kv_lora_rank",),
    "qk_nope_dim": ("qk_nope_head_dim",),
    "qk_rope_dim": ("qk_rope_head_dim",),
    "value_dim": ("v_head_dim",),
    "index_heads": ("index_n_heads",),
    "index_head_dim": ("index_head_dim",),
    "index_topk": ("index_topk",),
    "num_draft_layers": ("num_nextn_predict_layers",),
}
"""Field of ModelConfig -> names in a config.json, the first that is there."""


def _hugging_face(row: Mapping[str, Any]) -> dict[str, Any]:
    kind = row.get("model_type")
    found: dict[str, Any] = {"architecture": WIRED_ALIKE.get(str(kind), kind)}
    for field, names in HF_NAMES.items():
        value = next((row[name] for name in names if row.get(name) is not None), None)
        if value is not None:
            found[field] = value
    if "head_dim" not in found and found.get("num_heads") and found.get("hidden_size"):
        found["head_dim"] = found["hidden_size"] // found["num_heads"]
    return found
