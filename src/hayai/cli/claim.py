"""`hayai claim`: is a speed claim physically possible, and what would have to be true?"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import click

from hayai.bench.claim import KV_BITS, PARALLEL, PRECISIONS, Hardware, Setup, ceiling, judge
from hayai.bench.claim_models import find_model
from hayai.bench.claim_points import check_points, find_hardware, hardware_table, providers
from hayai.bench.claim_report import (
    claim_json,
    claim_text,
    list_text,
    number,
    points_text,
    providers_text,
)
from hayai.bench.table import Section, render
from hayai.config import read_environment
from hayai.weights.pull import resolve_model

EXAMPLES = """\b
Examples:
  hayai claim glm-5.1 --claim 400 --hardware b200 --devices 8 --precision fp8
    the ceiling of one request without speculation, and what 400 tok/s ask for
  hayai claim glm-5.1 --claim 400 --hardware b200 --devices 8 --precision fp8 \\
      --drafts 3 --tokens-per-step 2.76 --step-cost 1.56 --base-speed 224
    with a draft layer, at a measured acceptance and step cost
  hayai claim model.gguf --bandwidth 27
    a file on this machine; `hayai doctor` measures the GB/s
  hayai claim --points
    public measured speeds, each with its share of the ceiling
  hayai claim --runs run.json
    prediction beside measurement, for files of `hayai bench speed --json`

How to read the answer: above the ceiling a claim is impossible; below it, it is only
not excluded. docs/claims.md works through an example.
"""


class Positive(click.FloatRange):
    """A finite number above zero (or from `min` on): 'nan' and 'inf' are none that a speed can have."""

    def __init__(self, low: float = 0.0, low_open: bool = True) -> None:
        super().__init__(min=low, min_open=low_open)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


@click.command(epilog=EXAMPLES)
@click.argument("model", required=False)
@click.option("--claim", type=Positive(), help="Tok/s of one request, as claimed.")
@click.option("--hardware", metavar="NAME", help="A row of --list.")
@click.option("--bandwidth", type=Positive(), metavar="GB/S",
              help="Read bandwidth of one device, in place of --hardware.")  # fmt: skip
@click.option("--devices", type=click.IntRange(1, 65536), default=1, show_default=True)
@click.option("--parallel", type=click.Choice(tuple(PARALLEL)), default="tp", show_default=True,
              help="How the devices share the work.")  # fmt: skip
@click.option("--precision", type=click.Choice(tuple(PRECISIONS)),
              help="Of the weights. [default: as a .gguf stores them]")  # fmt: skip
@click.option("--kv", type=click.Choice(tuple(KV_BITS)), default="bf16", show_default=True,
              help="Of keys and values.")  # fmt: skip
@click.option(
    "--batch", type=click.IntRange(1, 1 << 20), default=1, show_default=True, help="Requests at once."
)
@click.option("--context", type=click.IntRange(1, 1 << 24), default=1024, show_default=True,
              help="Positions that a new token sees.")  # fmt: skip
@click.option("--drafts", type=click.IntRange(0, 64), default=0, show_default=True,
              help="Speculation: tokens drafted per step.")  # fmt: skip
@click.option("--tokens-per-step", type=Positive(1.0, low_open=False),
              help="Speculation: tokens committed per step. [default: all drafts and one]")  # fmt: skip
@click.option("--step-cost", type=Positive(1.0, low_open=False),
              help="A speculative step over a plain one, measured. [default: counted]")  # fmt: skip
@click.option("--external-draft", is_flag=True, help="Drafts come from elsewhere and cost nothing.")
@click.option("--base-speed", type=Positive(),
              help="Tok/s measured without speculation: says which acceptance a claim needs.")  # fmt: skip
@click.option("--collective-us", type=Positive(low_open=False), default=0.0, show_default=True,
              help="Latency of one all-reduce (or hand-over), in microseconds.")  # fmt: skip
@click.option("--list", "show_list", is_flag=True, help="Models, precisions and hardware, with sources.")
@click.option("--points", "show_points", is_flag=True, help="Public measured points against their ceilings.")
@click.option("--providers", "show_providers", is_flag=True, help="Claimed speeds of hosted models.")
@click.option("--runs", type=click.Path(exists=True, dir_okay=False, path_type=Path), multiple=True,
              help="A file of `hayai bench speed --json` (may be given more than once).")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str | None, claim: float | None, hardware: str | None, bandwidth: float | None, devices: int,
    parallel: str, precision: str | None, kv: str, batch: int, context: int, drafts: int,
    tokens_per_step: float | None, step_cost: float | None, external_draft: bool, base_speed: float | None,
    collective_us: float, show_list: bool, show_points: bool, show_providers: bool, runs: tuple[Path, ...],
    as_json: bool,
) -> None:  # fmt: skip
    """Is a speed physically possible?

    MODEL is a name of --list, 'default', a .gguf, or a config.json. From the model's own plan: which bytes
    a token must read and how many operations it takes; from the hardware's peak rates: the least time for
    that, and so the ceiling in tokens per second.
    """
    tables = [show_list, show_points, show_providers, bool(runs)]
    if sum(tables) + (model is not None) != 1:
        raise click.UsageError("give a MODEL, or one of --list, --points, --providers, --runs")
    if model is None:
        _tables(show_list, show_points, show_providers, runs, as_json)
        return
    if (hardware is None) == (bandwidth is None):
        raise click.UsageError(f"give --hardware ({', '.join(hardware_table())}) or --bandwidth")
    setup = Setup(
        model=find_model(_path(model)),
        hardware=_device(hardware, bandwidth),
        precision=precision,
        kv=kv,
        devices=devices,
        parallel=parallel,
        batch=batch,
        context=context,
        drafts=drafts,
        tokens_per_step=1.0 + drafts if tokens_per_step is None else tokens_per_step,
        step_cost=step_cost,
        own_draft=not external_draft,
        collective_us=collective_us,
    )
    bound = ceiling(setup)
    verdict = None if claim is None else judge(setup, bound, claim, base_speed)
    if as_json:
        click.echo(json.dumps(claim_json(setup, bound, verdict), indent=1))
    else:
        click.echo(claim_text(setup, bound, verdict))


def _path(model: str) -> str:
    """The default model's file, where that is meant."""
    return str(resolve_model(model, read_environment().home)) if model == "default" else model


def _device(name: str | None, bandwidth: float | None) -> Hardware:
    if name is not None:
        return find_hardware(name)
    assert bandwidth is not None
    return Hardware("given", f"device that reads {bandwidth:g} GB/s", bandwidth)


def _tables(
    show_list: bool, show_points: bool, show_providers: bool, runs: tuple[Path, ...], as_json: bool
) -> None:
    data: Any
    if show_list:
        data, text = [dataclasses.asdict(h) for h in hardware_table().values()], list_text
    elif show_points:
        checked = check_points()
        data = [
            dataclasses.asdict(c.point)
            | {"ceiling": None if c.ceiling is None else c.ceiling.per_request, "share": c.share}
            for c in checked
        ]
        text = lambda: points_text(checked)  # noqa: E731
    elif show_providers:
        data, text = [dataclasses.asdict(p) for p in providers()], lambda: providers_text(providers())
    else:
        data, text = _runs(runs)
    click.echo(json.dumps(data, indent=1) if as_json else text())


def _runs(paths: tuple[Path, ...]) -> tuple[list[dict[str, Any]], Any]:
    # the bench's records import the engine: slow, and the other tables don't need it
    from hayai.bench.claim_runs import predictions

    found = [one for path in paths for one in predictions(path)]
    rows = [
        (
            one.model, one.case + ("" if one.depth is None else f" {one.depth}"), f"{one.step_megabytes:.1f}",
            f"{one.gb_per_second:.1f}", number(one.predicted), number(one.measured), f"{one.share:.0%}",
            str(one.n),
        )
        for one in found
    ]  # fmt: skip
    names = ("model", "case", "MB/step", "GB/s", "predicted", "measured", "share", "n")
    notes = ("tok/s, medians; predicted: the bandwidth of the same pair over the bytes of the step",)
    table = render(names, [Section("", rows, notes)], right=names[2:])
    return [dataclasses.asdict(one) for one in found], lambda: table
