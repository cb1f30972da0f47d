"""The paper says what is: every metric in the guide, no other in dashboard and alerts, files that parse."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import httpx

from hayai.config import read_environment
from hayai.config_file import resolve
from server_process import InnerServer

ROOT = Path(__file__).resolve().parents[2]
StartServer = Callable[..., InnerServer]


def test_every_metric_is_in_the_guide_and_every_one_there_exists(inner_server: StartServer) -> None:
    """docs/operating.md and the dashboard name what a scrape has, and the guide all of it."""
    server = inner_server(read_bandwidth=20.0)
    httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 3})
    httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "temperature": 9})
    text = httpx.get(f"{server.url}/metrics").text
    kinds = dict(re.findall(r"^# TYPE (hayai_\w+) (\w+)", text, re.M))
    guide = set(re.findall(r"\bhayai_\w+", (ROOT / "docs/operating.md").read_text()))
    plain = {name.removesuffix("_total") for name in kinds}
    assert sorted(plain - guide) == [], "the guide does not tell of these"
    exist = set(kinds)
    for name, kind in kinds.items():
        if kind == "histogram":
            exist |= {f"{name}{end}" for end in ("_bucket", "_sum", "_count")}
    for page, known in (
        ("docs/operating.md", exist | plain),
        ("deploy/grafana-dashboard.json", exist),
        ("deploy/prometheus-alerts.yml", exist),
    ):
        named = set(re.findall(r"\bhayai_[a-z_]+", (ROOT / page).read_text()))
        assert sorted(named - known) == [], f"{page} names metrics that there are not"


def test_the_dashboard_is_whole() -> None:
    board = json.loads((ROOT / "deploy/grafana-dashboard.json").read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len(panels) >= 12 and len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert all(panel["title"] and panel["targets"] for panel in panels)
    assert all(target["expr"] for panel in panels for target in panel["targets"])


def test_the_example_configuration_is_one(tmp_path: Path) -> None:
    resolved = resolve(read_environment({"HOME": "nowhere"}), ROOT / "deploy/hayai.toml")
    assert resolved.server.require_keys and resolved.server.aliases == {"gpt-4o-mini": "default"}
    text = (ROOT / "deploy/hayai.toml").read_text()
    for line in re.findall(r"^# (?:\w+ = |\[).*$", text, re.M):  # what is commented out is right as well
        text = text.replace(line, line[2:])
    path = tmp_path / "full.toml"
    path.write_text(text)
    full = resolve(read_environment({"HOME": "nowhere"}), path)
    assert full.server.max_waiting == 8 and full.server.metrics_tenant == "ops"
    assert full.server.drain_seconds < 45, "the unit and the image leave 45 seconds"
