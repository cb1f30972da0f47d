"""Tiny random models, and drivers that run them: for tests of plans, backends and the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hayai.backends.base import BLOCK_SIZE, Limits, SamplingRow, StepInput, StepOutput
from hayai.backends.reference import ReferenceBackend, ReferenceRunner
from hayai.backends.reference_ops import run_lockstep
from hayai.config import ModelConfig, RopeConfig
from hayai.formats import QuantTensor
from hayai.plan.plan import Plan
from hayai.weights.loader import FileWeights

Arrays = dict[str, NDArray[np.float32]]

LLAMA = ModelConfig(
    architecture="llama",
    vocab_size=96,
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_size=96,
    context_length=256,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0, rotary_dim=16, interleaved=False),
)

GLM = ModelConfig(
    architecture="glm_moe_dsa",
    vocab_size=96,
    hidden_size=64,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    ffn_size=96,
    context_length=256,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0, rotary_dim=8, interleaved=True),
    num_experts=8,
    experts_per_token=2,
    num_shared_experts=1,
    moe_ffn_size=32,
    num_dense_layers=1,
    router_score="sigmoid",
    router_scaling=2.5,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_dim=16,
    qk_rope_dim=8,
    value_dim=16,
    index_heads=4,
    index_head_dim=16,
    index_topk=16,
    num_draft_layers=1,
)


@dataclass(frozen=True)
class MemoryFile:
    """Tensors in memory with the face of a container; `format` is what matrices are stored in."""

    arrays: Mapping[str, NDArray[np.float32]]
    format: str = "f32"

    @property
    def tensors(self) -> Mapping[str, object]:
        return self.arrays

    def read(self, name: str) -> QuantTensor:
        array = self.arrays[name]
        return QuantTensor.from_float(array, self.format if array.ndim == 2 else "f32")


def _randoms(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Arrays:
    """Norm weights near 1, other vectors near 0, matrices scaled so that activations keep their size."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in shapes.items():
        x = rng.standard_normal(shape)
        if len(shape) > 1:
            x = x / np.sqrt(shape[-1])
        elif name.endswith("bias"):
            x = 0.2 * x
        else:
            x = 1 + 0.2 * x
        made[name] = x.astype(np.float32)
    return made


def llama_tensors(config: ModelConfig, seed: int = 0) -> Arrays:
    """HF names. Without lm_head where the config ties it."""
    hidden, dim, ffn = config.hidden_size, config.head_dim, config.ffn_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tied_head:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        name = f"model.layers.{layer}."
        for part, rows in (("q", config.num_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads)):
            shapes[f"{name}self_attn.{part}_proj.weight"] = (rows * dim, hidden)
            if config.attention_bias:
                shapes[f"{name}self_attn.{part}_proj.bias"] = (rows * dim,)
        shapes[f"{name}self_attn.o_proj.weight"] = (hidden, config.num_heads * dim)
        shapes |= _mlp_shapes(f"{name}mlp.", ffn, hidden)
        shapes |= {f"{name}{norm}.weight": (hidden,) for norm in LAYER_NORMS}
    if config.rope.scaling_kind == "factors":
        shapes["rope_freqs.weight"] = (config.rope.rotary_dim // 2,)
    return _randoms(shapes, seed)


LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")


def _mlp_shapes(name: str, size: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}gate_proj.weight": (size, hidden),
        f"{name}up_proj.weight": (size, hidden),
        f"{name}down_proj.weight": (hidden, size),
    }


def glm_tensors(config: ModelConfig, seed: int = 0, own_draft_tables: bool = False) -> Arrays:
    """HF names of a GLM-5 checkpoint, the draft layer included."""
    hidden, vocab, heads = config.hidden_size, config.vocab_size, config.num_heads
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(config.num_layers + config.num_draft_layers):
        name = f"model.layers.{layer}."
        shapes |= {f"{name}{norm}.weight": (hidden,) for norm in LAYER_NORMS}
        attn = name + "self_attn."
        shapes |= {
            attn + "q_a_proj.weight": (config.q_lora_rank, hidden),
            attn + "q_a_layernorm.weight": (config.q_lora_rank,),
            attn + "q_b_proj.weight": (heads * (config.qk_nope_dim + config.qk_rope_dim), config.q_lora_rank),
            attn + "kv_a_proj_with_mqa.weight": (config.kv_lora_rank + config.qk_rope_dim, hidden),
            attn + "kv_a_layernorm.weight": (config.kv_lora_rank,),
            attn + "kv_b_proj.weight": (heads * (config.qk_nope_dim + config.value_dim), config.kv_lora_rank),
            attn + "o_proj.weight": (hidden, heads * config.value_dim),
        }
        if config.index_topk:
            index, dim = attn + "indexer.", config.index_head_dim
            shapes |= {
                index + "wq_b.weight": (config.index_heads * dim, config.q_lora_rank),
                index + "wk.weight": (dim, hidden),
                index + "k_norm.weight": (dim,),
                index + "k_norm.bias": (dim,),
                index + "weights_proj.weight": (config.index_heads, hidden),
            }
        if layer < config.num_dense_layers:
            shapes |= _mlp_shapes(name + "mlp.", config.ffn_size, hidden)
            continue
        shapes[name + "mlp.gate.weight"] = (config.num_experts, hidden)
        shapes[name + "mlp.gate.e_score_correction_bias"] = (config.num_experts,)
        shapes |= _mlp_shapes(name + "mlp.shared_experts.", config.moe_ffn_size, hidden)
        for expert in range(config.num_experts):
            shapes |= _mlp_shapes(f"{name}mlp.experts.{expert}.", config.moe_ffn_size, hidden)
    if config.num_draft_layers:
        name = f"model.layers.{config.num_layers}."
        shapes |= {f"{name}{norm}.weight": (hidden,) for norm in ("enorm", "hnorm", "shared_head.norm")}
        shapes[name + "eh_proj.weight"] = (hidden, 2 * hidden)
        if own_draft_tables:
            shapes[name + "embed_tokens.weight"] = (vocab, hidden)
            shapes[name + "shared_head.head.weight"] = (vocab, hidden)
    return _randoms(shapes, seed)


LIMITS = Limits(max_tokens=128, max_sequences=8, max_rows=128, num_blocks=96, max_context=256)


def compile_reference(
    plans: Mapping[str, Plan], arrays: Arrays, format: str = "f32", **options: Any
) -> ReferenceRunner:
    """The reference backend on tensors in memory; caches in float32 unless an option says otherwise."""
    backend = ReferenceBackend(**{"kv_dtype": "f32", **options})
    return backend.compile(plans, FileWeights(MemoryFile(arrays, format), "hf"), LIMITS)


@dataclass
class LockstepRanks:
    """N ranks of a sharded plan in one process, op by op; has the face of a runner's `step`."""

    runners: Sequence[ReferenceRunner]

    def step(self, step: StepInput, plan: str = "main") -> StepOutput:
        contexts = [runner.begin(step, plan) for runner in self.runners]
        run_lockstep(contexts)
        outputs = [runner.finish(ctx) for runner, ctx in zip(self.runners, contexts, strict=True)]
        for other in outputs[1:]:
            assert np.array_equal(other.tokens, outputs[0].tokens)
        return outputs[0]


@dataclass
class Sequences:
    """Feeds several sequences to a runner, their cache blocks scattered over memory.

    Table entries past a sequence's last position hold a number that no cache has.
    """

    runner: Any
    plan: Plan
    seed: int = 0
    lengths: dict[int, int] = field(default_factory=dict)
    tables: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    free: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.free = {name: rng.permutation(LIMITS.num_blocks).tolist() for name in self.plan.groups}

    def step(
        self,
        chunks: Mapping[int, Sequence[int]],
        *,
        plan: str = "main",
        rows: str = "all",
        sampling: Sequence[SamplingRow] | None = None,
        advance: bool = True,
        at: Mapping[int, int] | None = None,
        **fields: Any,
    ) -> StepOutput:
        """Run `chunks` (sequence -> tokens), each after what its sequence has (or from position at[seq]).

        rows: 'all' or 'last' (of each sequence) get logits.
        """
        starts, positions, tokens = [0], [], []
        for sequence, ids in chunks.items():
            first = (at or self.lengths).get(sequence, 0)
            tokens += list(ids)
            positions += list(range(first, first + len(ids)))
            starts.append(len(tokens))
            self._reserve(sequence, first + len(ids))
            if advance:
                self.lengths[sequence] = first + len(ids)
        wanted = range(len(tokens)) if rows == "all" else [stop - 1 for stop in starts[1:]]
        step = StepInput(
            token_ids=np.array(tokens, np.int32),
            positions=np.array(positions, np.int32),
            query_start=np.array(starts, np.int32),
            block_tables={name: self._table(name, chunks) for name in self.plan.groups},
            logit_rows=np.array(wanted, np.int32),
            sampling=tuple(sampling or [SamplingRow()] * len(wanted)),
            want_logits=True,
        )
        return self.runner.step(replace(step, **fields), plan)

    def logits(self, chunks: Mapping[int, Sequence[int]], **options: Any) -> NDArray[np.float32]:
        found = self.step(chunks, **options).logits
        assert found is not None
        return found

    def _reserve(self, sequence: int, length: int) -> None:
        for name in self.plan.groups:
            table = self.tables.setdefault((name, sequence), [])
            while len(table) * BLOCK_SIZE < length:
                table.append(self.free[name].pop())

    def _table(self, group: str, chunks: Mapping[int, Sequence[int]]) -> NDArray[np.int32]:
        table = np.full((len(chunks), LIMITS.max_context // BLOCK_SIZE), 1 << 30, np.int32)
        for row, sequence in enumerate(chunks):
            blocks = self.tables[group, sequence]
            table[row, : len(blocks)] = blocks
        return table
