"""All configuration: frozen dataclasses, resolved once. The only reader of the environment.

Environment variables (all of them):
  HAYAI_HOME      folder of downloaded models and caches (default: ~/.cache/hayai)
  HAYAI_THREADS   default number of compute threads
  HAYAI_ISA       lower the instruction set for tests: 'scalar', 'avx2', 'avx512' (never raises it)
  HAYAI_DATA      folder of evaluation data
  HAYAI_DATABASE  URL of keys and usage ledger (its password does not belong on a command line)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hayai.errors import ConfigError


@dataclass(frozen=True)
class Environment:
    """What the environment says, read once. home: what can be fetched or made again (models, caches). state:
    what can't (keys, ledger, stored responses): in HAYAI_HOME too where that is set, else where XDG says."""

    home: Path
    threads: int | None
    isa: str | None
    data: Path | None
    state: Path
    database: str | None


def read_environment(env: Mapping[str, str] | None = None) -> Environment:
    """Read the HAYAI_* variables; an unknown one or a bad value is a ConfigError."""
    env = os.environ if env is None else env
    known = {"HAYAI_HOME", "HAYAI_THREADS", "HAYAI_ISA", "HAYAI_DATA", "HAYAI_DATABASE"}
    unknown = sorted(k for k in env if k.startswith("HAYAI_") and k not in known)
    if unknown:
        raise ConfigError(f"unknown environment variable {unknown[0]}; known: {', '.join(sorted(known))}")
    threads = env.get("HAYAI_THREADS")
    if threads is not None and not (threads.isdigit() and 1 <= int(threads) <= 1024):
        raise ConfigError(f"HAYAI_THREADS must be a number from 1 to 1024: {threads!r}")
    isa = env.get("HAYAI_ISA")
    if isa is not None and isa not in ("scalar", "avx2", "avx512"):
        raise ConfigError(f"HAYAI_ISA must be scalar, avx2 or avx512: {isa!r}")
    data = env.get("HAYAI_DATA")
    home = env.get("HAYAI_HOME")
    cache = env.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    state = env.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Environment(
        home=Path(home) if home else Path(cache) / "hayai",
        threads=int(threads) if threads else None,
        isa=isa,
        data=Path(data) if data else None,
        state=Path(home) / "state" if home else Path(state) / "hayai",
        database=env.get("HAYAI_DATABASE") or None,
    )


def one_blas_thread() -> None:
    """Keep numpy, not imported yet, from starting threads for its matrix products, unless the user has said
    how many. For callers that compute in our own kernels, where those threads only hold memory."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position settings as the file gives them (see plan.ops.RopeScaling for the kinds)."""

    theta: float = 10000.0
    rotary_dim: int = 0
    interleaved: bool = True
    scaling_kind: str | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """A model's shape, normalised: every container (GGUF, Hugging Face) is read into this.

    Fields that a family does not have keep their zero. Sizes are counts of elements.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    context_length: int
    norm_eps: float
    rope: RopeConfig = field(default_factory=RopeConfig)
    act: str = "silu"
    tied_head: bool = False
    attention_bias: bool = False
    # mixture of experts
    num_experts: int = 0
    experts_per_token: int = 0
    num_shared_experts: int = 0
    moe_ffn_size: int = 0
    num_dense_layers: int = 0
    expert_groups: int = 1
    expert_top_groups: int = 1
    router_score: str = "softmax"
    router_scaling: float = 1.0
    router_normalize: bool = True
    # latent attention (MLA) and its sparse index
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_nope_dim: int = 0
    qk_rope_dim: int = 0
    value_dim: int = 0
    index_heads: int = 0
    index_head_dim: int = 0
    index_topk: int = 0
    # multi-token prediction layers
    num_draft_layers: int = 0


@dataclass(frozen=True)
class EngineConfig:
    """How to run a model. `None` means: chosen at start from the model and the machine.

    kv_tokens or kv_bytes: size of the KV cache, by positions or by memory (not both). kv_format: 'f16' or
    'q8'. prefix_cache: keep finished sequences' KV for prompts that begin alike. step_ms: how long a step may
    take while somebody waits for the tokens of a running sequence, so how much of a prompt it takes in
    beside; None: 2.5 times a decode step as measured.
    """

    model: str = "default"
    backend: str = "cpu"
    threads: int | None = None
    isa: str | None = None
    context_length: int | None = None
    max_sequences: int = 16
    max_step_tokens: int = 512
    kv_tokens: int | None = None
    kv_bytes: int | None = None
    kv_format: str = "f16"
    prefix_cache: bool = True
    step_ms: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class LimitsConfig:
    """The most that one request may ask for, of everything that costs time or memory before a token is made.

    Counts, bytes (UTF-8) and characters as the names say. max_parts: content parts (blocks) of all messages
    together. max_logit_bias: tokens that logit_bias names. max_choices: prompts times `n`. max_schema_depth:
    levels of nested objects and arrays in a JSON schema. max_grammar_cost: fuel of the grammar compiler per
    request (a regex or schema that needs more is refused).
    """

    max_messages: int = 4096
    max_parts: int = 16_384
    max_logit_bias: int = 1024
    max_tools: int = 128
    max_schema_bytes: int = 256 << 10
    max_schema_depth: int = 32
    max_regex_bytes: int = 16 << 10
    max_grammar_cost: int = 1_000_000
    max_choices: int = 128
    max_stop_strings: int = 16
    max_stop_bytes: int = 4096
    max_logprobs: int = 20


@dataclass(frozen=True)
class ServerConfig:
    """The HTTP face. aliases: names that clients ask for -> the model that is served ('default', or the
    file's). state_dir: folder of what outlives the process: keys, ledger, stored responses, batches.

    max_waiting: choices that may wait beside those that run; None = half of max_sequences (server/gate.py
    says why). queue_seconds: the longest estimated wait; more is refused with 429. request_timeout: seconds
    after which a request ends, None = never. drain_seconds: how long running requests may take to end after
    SIGTERM. batch_parallel: lines of batches that run at once on an idle server; None = half of
    max_sequences. otlp_endpoint: where traces go (OpenTelemetry over HTTP), None = nowhere.

    database: URL of keys and ledger (SQLite or PostgreSQL), None = there is none. require_keys: None = from
    the moment that the database has a key. tls_cert and tls_key: PEM files, None = no TLS. log_requests: file
    that gets every prompt and answer, None = nobody keeps them. read_bandwidth: of this machine, in GB/s, as
    `hayai doctor` measures it (for the share of the read roofline). metrics_tenant: whose keys may read
    /metrics from other machines.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_body_bytes: int = 32 << 20
    max_waiting: int | None = None
    queue_seconds: float = 10.0
    request_timeout: float | None = None
    drain_seconds: float = 30.0
    batch_parallel: int | None = None
    otlp_endpoint: str | None = None
    limits: LimitsConfig = LimitsConfig()
    aliases: Mapping[str, str] = field(default_factory=dict)
    state_dir: Path | None = None
    database: str | None = None
    require_keys: bool | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    log_requests: Path | None = None
    read_bandwidth: float | None = None
    metrics_tenant: str | None = None


def hide_password(url: str) -> str:
    """A database's URL as it may be printed: without its password, wherever that stands."""
    scheme, found, rest = url.partition("://")
    login, at, host = rest.rpartition("@")
    if not found:
        return url
    if "?" in login:  # part of a password, or an option that is one: either way, show nothing of it
        return f"{scheme}://***"
    user, colon, _ = login.partition(":")
    return f"{scheme}://{user}{':***' if colon else ''}{at}{host.partition('?')[0]}"
