"""Who may import whom: the table of docs/map.md, checked over every import statement of the package.

Imports under `if TYPE_CHECKING` and inside functions count like all others.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "src" / "hayai"

BOTTOM = ("errors", "config", "formats", "logs")
FRONTEND = (
    "errors",
    "config",
    "load",
    "text",
    "engine.request",
    "engine.service",
    "engine.engine",
    "engine.mask",
)
BENCH = ("", "errors", "config", "frontend")
ALLOWED: dict[str, tuple[str, ...]] = {
    "errors": (),
    "logs": (),
    "config": ("errors",),
    "config_file": ("errors", "config"),
    "formats": ("errors",),
    "plan": BOTTOM,
    "weights": (*BOTTOM, "plan"),
    "text": ("errors", "config"),
    "models": (*BOTTOM, "plan"),
    "backends": (*BOTTOM, "plan"),
    "backends.cpu": (*BOTTOM, "plan", "_native"),
    "backends.cpu_build": (*BOTTOM, "plan", "_native"),
    "engine": ("errors", "config", "logs", "plan.plan", "backends.base"),
    "load": (*BOTTOM, "plan", "models", "weights", "text", "backends", "engine"),
    "frontend": FRONTEND,
    "frontend_answer": FRONTEND,
    "frontend_async": FRONTEND,
    "frontend_prompt": FRONTEND,
    "frontend_request": FRONTEND,
    "frontend_stops": FRONTEND,
    "frontend_text": FRONTEND,
    "api": ("errors", "config", "engine.request", "frontend", "frontend_request", "load"),
    "": ("api",),
    "server": ("errors", "config", "frontend", "frontend_request", "engine.request", ""),
    "bench": BENCH,
    "bench.claims": (*BENCH, "formats", "plan", "models", "weights.gguf"),
    "bench.claim": (*BENCH, "plan"),
    "bench.claim_models": (*BENCH, "formats", "plan", "models", "weights.gguf"),
    "bench.inprocess": (*BENCH, "load", "engine.request", "backends.base", "_native"),
    "cli": ("",),
}
"""Layer (a module, or a folder; the longest name counts) -> modules and folders it may import. A folder may
import itself, sibling modules of one layer (frontend and frontend_*) each other, and the cli anything."""

NEVER = {"torch", "triton", "transformers", "llama_cpp"}
"""Packages that no layer may need: an install for the CPU is numpy and our own wheel."""

LAZY = {
    "asyncio", "hashlib", "logging", "readline", "rich", "uvloop",
    "hayai._native", "hayai.api", "hayai.backends", "hayai.bench",
    "hayai.frontend_answer", "hayai.frontend_async", "hayai.text.budget", "hayai.text.sandbox",
    "hayai.text.tool_prompt", "hayai.weights.download", "tokenizers",
    "hayai.server.ledger", "hayai.server.reports", "hayai.server.responses_store",
    "hayai.server.storage",
    "llguidance", "opentelemetry", "prometheus_client", "python_multipart",
}  # fmt: skip
"""Optional or slow, so that a function may import them (below a comment that says why)."""

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted(ROOT.rglob("*.py"))
}


def imports(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """Every (statement, imported module) in a file; a `from a import b` names a.b where that is a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                known = name.removeprefix("hayai.") in MODULES or name == "hayai._native"
                yield node, name if known else str(node.module)


def ours(name: str) -> str | None:
    """The module's name below hayai ('' = the public API), None for other packages."""
    return name[6:] if name.split(".")[0] == "hayai" else None


def within(module: str, layer: str) -> bool:
    return module == layer or (layer != "" and module.startswith(layer + "."))


def layer_of(module: str) -> str:
    return max((layer for layer in ALLOWED if within(module, layer)), key=len)


def home_of(module: str) -> str:
    """The folder, or the family of files, that may use itself freely."""
    return "frontend" if module.startswith("frontend_") else module.split(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_what_its_layer_may(module: str) -> None:
    allowed = ALLOWED[layer_of(module)]
    for node, name in imports(MODULES[module]):
        target, place = ours(name), f"{module or 'hayai'}:{node.lineno}"
        assert name.split(".")[0] not in NEVER, f"{place} imports {name}"
        if target is None or home_of(module) in (home_of(target), "cli"):
            continue
        assert any(within(target, layer) for layer in allowed), (
            f"{place} imports hayai.{target}; allowed: {', '.join(a or 'hayai' for a in allowed)}"
        )


@pytest.mark.parametrize("module", MODULES)
def test_uses_no_private_name_of_another_module(module: str) -> None:
    for node, name in imports(MODULES[module]):
        if isinstance(node, ast.ImportFrom) and ours(name) is not None:
            private = [a.name for a in node.names if a.name.startswith("_") and a.name != "_native"]
            assert not private, f"{module}:{node.lineno} imports {private} from {name}"


@pytest.mark.parametrize("module", MODULES)
def test_functions_import_only_what_is_optional_or_slow(module: str) -> None:
    lines = MODULES[module].read_text().splitlines()
    tree = ast.parse("\n".join(lines))
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    explained: dict[str, bool] = {}
    for node, name in imports(MODULES[module]):
        starts = [f.lineno for f in functions if f.lineno < node.lineno <= (f.end_lineno or 0)]
        if starts:
            lazy = any(name == known or name.startswith(known + ".") for known in LAZY)
            assert lazy, f"{module or 'hayai'}:{node.lineno} imports {name} inside a function"
            comment = any("#" in line for line in lines[max(starts) : node.end_lineno])
            explained[name] = explained.get(name, False) or comment
    silent = [name for name, comment in explained.items() if not comment]
    assert not silent, f"{module}: no comment says why {', '.join(silent)} is imported inside a function"


def test_no_circles() -> None:
    graph = {
        module: {target for _, name in imports(path) if (target := ours(name)) in MODULES}
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join((*path[path.index(module) :], module))}"
        if module not in done:
            for target in graph[module]:
                visit(target or "", (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())
