"""A peer engine in a process of its own, driven by JSON lines; run as a script by the peer's Python.

It imports nothing of ours, so that the peers may live in another environment. One command per line on
stdin, one answer per line on the original stdout; whatever the peer prints goes to stderr. Clock points
are `time.perf_counter()`, one after each token has been *chosen* (argmax over the logits, on the host).

The measured loop is the peer's C API called directly (no sampler objects, no text): batches are filled
before the clock starts, and the argmax is one numpy call over the peer's own logits buffer.

Commands: hello, load, context, generate, batch, score, logits, quantize, exit. Answers: {"ok": true, ...} or
{"ok": false, "error": text}.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import numpy as np

clock = time.perf_counter


class Peer:
    """The two peers share one C API (ik_llama.cpp is a fork); `api` is the package's ctypes module."""

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.package = load_package({"llama.cpp": "llama_cpp", "ik_llama.cpp": "ik_llama_cpp"}[engine])
        # The fork keeps its low-level calls in a private module. Its high-level class turns flash attention
        # off unless py-cpuinfo shows it AVX-VNNI; calling the C API passes that guard.
        self.api: Any = (
            self.package if engine == "llama.cpp" else importlib.import_module("ik_llama_cpp._ctypes_api")
        )
        self.api.llama_backend_init()
        self.model: Any = None
        self.context: Any = None
        self.vocab_size = 0
        self.capacity = 0
        self.batch: Any = None

    # ------------------------------------------------------------ set-up

    def hello(self) -> dict[str, Any]:
        """Version and build of the peer."""
        info = getattr(self.api, "llama_print_system_info", None)
        return {
            "version": str(getattr(self.package, "__version__", "unknown")),
            "build": info().decode() if info is not None else library_build(self.package),
            "pid": os.getpid(),
        }

    def load(self, path: str, params: dict[str, Any]) -> dict[str, Any]:
        """Load a GGUF file; any earlier model and context are freed."""
        self.free_context()
        if self.model:
            free = getattr(self.api, "llama_model_free", None) or self.api.llama_free_model
            free(self.model)
        settings = self.api.llama_model_default_params()
        set_fields(settings, {"n_gpu_layers": 0, **params})
        started = clock()
        self.model = self.api.llama_model_load_from_file(path.encode(), settings)
        if not self.model:
            raise RuntimeError(f"{self.engine} can't load {path}")
        vocab = self.api.llama_model_get_vocab(self.model)
        count = getattr(self.api, "llama_vocab_n_tokens", None) or self.api.llama_n_vocab
        self.vocab_size = int(count(vocab))
        return {"seconds": clock() - started, "vocab_size": self.vocab_size}

    def new_context(self, threads: int, params: dict[str, Any]) -> dict[str, Any]:
        """A fresh context; its batch holds up to `n_ctx` tokens."""
        self.free_context()
        settings = self.api.llama_context_default_params()
        set_fields(settings, {"n_threads": threads, "n_threads_batch": threads, **params})
        self.context = self.api.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError(f"{self.engine} refuses the context {params}")
        self.capacity = int(params["n_ctx"])
        self.batch = self.api.llama_batch_init(self.capacity, 0, 1)
        for i in range(self.capacity):
            self.batch.n_seq_id[i] = 1
        return {"fields": {k: v for k, v in plain_fields(settings).items() if k in params}}

    def free_context(self) -> None:
        if self.context:
            self.api.llama_batch_free(self.batch)
            self.api.llama_free(self.context)
            self.context = None

    # ------------------------------------------------------------ one step

    def clear(self) -> None:
        if self.engine == "llama.cpp":
            self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)
        else:
            self.api.llama_kv_cache_clear(self.context)

    def fill(self, tokens: list[int], positions: list[int], sequences: list[int], wanted: set[int]) -> None:
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(zip(tokens, positions, sequences, strict=True)):
            batch.token[i], batch.pos[i], batch.seq_id[i][0] = token, position, sequence
            batch.logits[i] = 1 if i in wanted else 0

    def decode(self) -> None:
        code = self.api.llama_decode(self.context, self.batch)
        if code != 0:
            raise RuntimeError(f"{self.engine}: llama_decode gave {code}")

    def logits(self, row: int) -> Any:
        """Logits of batch row `row` as an array over the peer's own memory (vocab_size) f32."""
        pointer = self.api.llama_get_logits_ith(self.context, row)
        address = ctypes.addressof(pointer.contents)
        memory: Any = (ctypes.c_float * self.vocab_size).from_address(address)
        return np.frombuffer(memory, np.float32)

    # ------------------------------------------------------------ measured work

    def generate(self, prompt: list[int], steps: int) -> dict[str, Any]:
        """Greedy: the prompt in one call, then `steps` tokens one at a time. times[0] is the first token."""
        self.clear()
        n = len(prompt)
        self.fill(prompt, list(range(n)), [0] * n, {n - 1})
        tokens, times = [], []
        started = clock()
        self.decode()
        token = int(self.logits(n - 1).argmax())
        times.append(clock())
        tokens.append(token)
        batch = self.batch
        batch.n_tokens, batch.seq_id[0][0], batch.logits[0] = 1, 0, 1
        for position in range(n, n + steps):
            batch.token[0], batch.pos[0] = token, position
            self.decode()
            token = int(self.logits(0).argmax())
            times.append(clock())
            tokens.append(token)
        return {"started": started, "times": times, "tokens": tokens}

    def generate_batch(self, prompts: list[list[int]], steps: int) -> dict[str, Any]:
        """All prompts one by one, then `steps` steps of one token for every sequence.

        times[0] is when the last prompt's first token was chosen, times[i] the end of step i.
        """
        self.clear()
        started = clock()
        last = []
        for sequence, prompt in enumerate(prompts):
            n = len(prompt)
            self.fill(prompt, list(range(n)), [sequence] * n, {n - 1})
            self.decode()
            last.append(int(self.logits(n - 1).argmax()))
        times, tokens = [clock()], [list(last)]
        count, batch = len(prompts), self.batch
        rows = set(range(count))
        self.fill(last, [len(p) for p in prompts], list(range(count)), rows)
        for _ in range(steps):
            self.decode()
            for i in range(count):
                token = int(self.logits(i).argmax())
                batch.token[i] = token
                batch.pos[i] += 1
                last[i] = token
            times.append(clock())
            tokens.append(list(last))
        return {"started": started, "times": times, "tokens": tokens}

    def score(self, windows: list[list[int]]) -> dict[str, Any]:
        """Negative log-likelihood (nats) of every token but the first of each window, teacher-forced."""
        nll: list[list[float]] = []
        for window in windows:
            self.clear()
            n = len(window)
            self.fill(window, list(range(n)), [0] * n, set(range(n)))
            self.decode()
            row = []
            for i in range(n - 1):
                logits = self.logits(i).astype(np.float64)
                top = logits.max()
                row.append(float(top + np.log(np.exp(logits - top).sum()) - logits[window[i + 1]]))
            nll.append(row)
        return {"nll": nll}

    def save_logits(self, window: list[int], path: str) -> dict[str, Any]:
        """Teacher-forced logits (tokens, vocab_size) f32 of a window, written to a .npy file."""
        self.clear()
        n = len(window)
        self.fill(window, list(range(n)), [0] * n, set(range(n)))
        self.decode()
        np.save(path, np.stack([self.logits(i) for i in range(n)]))
        return {"rows": n}

    def quantize(self, source: str, target: str, params: dict[str, Any]) -> dict[str, Any]:
        """Requantise a file with the peer's own quantiser."""
        settings = self.api.llama_model_quantize_default_params()
        set_fields(settings, params)
        code = self.api.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings))
        if code != 0:
            raise RuntimeError(f"{self.engine}: llama_model_quantize gave {code}")
        return {"bytes": os.path.getsize(target)}


def load_package(name: str) -> Any:
    """Import a peer. A source build of ik_llama.cpp lacks the run path to its libggml: load that first."""
    try:
        return importlib.import_module(name)
    except OSError:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise
        library = os.path.join(spec.submodule_search_locations[0], "lib", "libggml.so")
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        return importlib.import_module(name)


def set_fields(structure: Any, values: dict[str, Any]) -> None:
    """Set fields by name; an unknown name is an error (another version of the peer)."""
    known = {name for name, *_ in structure._fields_}
    for name, value in values.items():
        if name not in known:
            raise RuntimeError(f"{type(structure).__name__} has no field {name}; it has {sorted(known)}")
        setattr(structure, name, value)


def plain_fields(structure: Any) -> dict[str, Any]:
    values = {name: getattr(structure, name) for name, *_ in structure._fields_}
    return {k: v for k, v in values.items() if isinstance(v, (bool, int, float))}


def library_build(package: Any) -> str:
    """Instruction set of a build that can't tell: whether its compute library names AVX-512 registers."""
    folder = os.path.join(os.path.dirname(str(package.__file__)), "lib")
    path = os.path.join(folder, "libggml.so")
    return f"libggml.so of {os.path.getsize(path)} bytes" if os.path.exists(path) else "unknown"


def answer(peer: Peer, command: dict[str, Any]) -> dict[str, Any]:
    op = command.pop("op")
    handlers: dict[str, Callable[..., dict[str, Any]]] = {
        "hello": peer.hello,
        "load": peer.load,
        "context": peer.new_context,
        "generate": peer.generate,
        "batch": peer.generate_batch,
        "score": peer.score,
        "logits": peer.save_logits,
        "quantize": peer.quantize,
    }
    return handlers[op](**command)


def serve(peer: Peer, lines: TextIO, out: TextIO) -> None:
    for line in lines:
        command = json.loads(line)
        if command["op"] == "exit":
            return
        try:
            reply = {"ok": True, **answer(peer, command)}
        except Exception as error:  # the parent decides what a peer's failure means
            reply = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(reply) + "\n")
        out.flush()


def die_with_parent() -> None:
    """Ask the kernel to end this process when the bench is gone; a stopped process would stay for ever."""
    PR_SET_PDEATHSIG, SIGKILL = 1, 9
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL)


def main() -> None:
    die_with_parent()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(Peer(sys.argv[1]), sys.stdin, out)


if __name__ == "__main__":
    main()
