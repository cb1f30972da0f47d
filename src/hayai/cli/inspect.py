"""`hayai inspect`: what is in a model file, without loading it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import click

from hayai.backends.base import kv_bytes_per_token
from hayai.cli.console import human_bytes
from hayai.config import ModelConfig, read_environment
from hayai.formats import FORMATS
from hayai.models.registry import build_plans
from hayai.plan.plan import Plan
from hayai.plan.validate import dump
from hayai.weights.gguf import GgufFile, model_config
from hayai.weights.pull import resolve_model


@click.command()
@click.argument("model", default="default")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--metadata", is_flag=True, help="List the metadata; long arrays by their length.")
@click.option("--plan", "show_plan", is_flag=True, help="Print the plan: every operation that is run.")
@click.option("--context", type=click.IntRange(min=1), help="Context for the memory need. [default: 2048]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str, tensors: bool, metadata: bool, show_plan: bool, context: int | None, as_json: bool
) -> None:
    """Show architecture, tensors, formats, bits per weight and memory need of MODEL (a .gguf file)."""
    path = resolve_model(model, read_environment().home)
    with GgufFile(path) as file:
        config = model_config(file)
        plans = build_plans(config)
        report = summary(file, config, plans, context or min(2048, config.context_length))
        if tensors:
            report["tensor_list"] = [
                {"name": t.name, "format": t.format, "shape": list(t.shape), "bytes": t.nbytes}
                for t in file.tensors.values()
            ]
        if metadata:
            report["metadata"] = {key: _shown(value) for key, value in file.metadata.items()}
    if show_plan:
        report["plans"] = {name: dump(plan) for name, plan in plans.items()}
    if as_json:
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        click.echo("\n".join(as_text(report)))


def summary(file: GgufFile, config: ModelConfig, plans: Mapping[str, Plan], context: int) -> dict[str, Any]:
    """Everything but the long lists. Memory need: weights as packed, and the cache of one sequence."""
    elements: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for tensor in file.tensors.values():
        counts[tensor.format] += 1
        sizes[tensor.format] += tensor.nbytes
        elements[tensor.format] += math.prod(tensor.shape)
    weights, total = sum(sizes.values()), sum(elements.values())
    groups = {name: group for plan in plans.values() for name, group in plan.groups.items()}
    cache = context * kv_bytes_per_token(groups.values(), "f16")
    return {
        "file": str(file.path),
        "file_bytes": file.size,
        "name": file.metadata.get("general.name"),
        "architecture": config.architecture,
        "parameters": total,
        "bits_per_weight": round(8 * weights / total, 3) if total else 0.0,
        "config": {k: v for k, v in asdict(config).items() if v not in (0, 0.0, False, None)},
        "vocabulary": "tokenizer.ggml.tokens" in file.metadata,
        "chat_template": "tokenizer.chat_template" in file.metadata,
        "tensors": len(file.tensors),
        "formats": {
            name: {
                "tensors": counts[name],
                "bytes": sizes[name],
                "elements": elements[name],
                "bits_per_weight": FORMATS[name].bits_per_weight,
            }
            for name in sorted(sizes, key=lambda n: -sizes[n])
        },
        "memory": {"weights_bytes": weights, "context": context, "cache_bytes": cache},
        "operations": {name: len(plan.ops) for name, plan in plans.items()},
    }


def as_text(report: Mapping[str, Any]) -> list[str]:
    """The report for people."""
    config, memory = report["config"], report["memory"]
    heads = (
        f"{config['num_heads']} heads, {config['num_kv_heads']} of keys and values, {config['head_dim']} wide"
    )
    rows = {
        "file": f"{report['file']} ({human_bytes(report['file_bytes'])})",
        "name": report["name"] or "(none)",
        "architecture": report["architecture"],
        "parameters": f"{report['parameters']:,}",
        "bits per weight": f"{report['bits_per_weight']:.2f}",
        "shape": f"{config['num_layers']} layers, hidden {config['hidden_size']}, ffn {config['ffn_size']}",
        "attention": heads,
        "vocabulary": f"{config['vocab_size']:,} tokens"
        + ("" if report["vocabulary"] else ", not in the file"),
        "chat template": "yes" if report["chat_template"] else "no",
        "context": f"{config['context_length']:,} tokens",
        "memory": f"{human_bytes(memory['weights_bytes'])} weights + "
        f"{human_bytes(memory['cache_bytes'])} cache at {memory['context']:,} tokens",
        "operations": ", ".join(f"{count} in plan {name}" for name, count in report["operations"].items()),
    }
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
    lines += ["", f"{'format':<8}{'tensors':>8}{'bits/weight':>13}{'size':>11}"]
    for name, row in report["formats"].items():
        bits, size = row["bits_per_weight"], human_bytes(row["bytes"])
        lines.append(f"{name:<8}{row['tensors']:>8}{bits:>13.4g}{size:>11}")
    if "tensor_list" in report:
        lines += ["", "tensors"]
        for t in report["tensor_list"]:
            shape = " x ".join(map(str, t["shape"]))
            lines.append(f"  {t['name']:<32} {t['format']:<6} {shape:<16} {human_bytes(t['bytes'])}")
    if "metadata" in report:
        lines += ["", "metadata"]
        lines += [f"  {key} = {value!r}" for key, value in report["metadata"].items()]
    for text in report.get("plans", {}).values():
        lines += ["", text.rstrip()]
    return lines


def _shown(value: object) -> object:
    """A metadata value, long ones shortened."""
    if isinstance(value, list) and len(value) > 8:
        return f"[{len(value)} values: {', '.join(repr(v)[:40] for v in value[:3])}, ...]"
    return value
