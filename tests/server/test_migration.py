"""The Python and the environment of docs/migration.md, run as they stand against a server with aliases."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server_process import ServerProcess, start_server

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migration.md"
TEXT = PAGE.read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)
URL = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def served(chat_model: Path) -> Iterator[ServerProcess]:
    """The server of the page's first block."""
    command = re.search(r"^hayai serve (.*)$", TEXT, re.M)
    assert command is not None
    running = start_server(chat_model, *command[1].split())
    try:
        yield running
    finally:
        running.process.kill()
        running.process.communicate()


def run(source: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", source],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_has_blocks_for_every_client() -> None:
    assert len(BLOCKS) >= 5
    assert {"OpenAI(", "Anthropic(", "AzureOpenAI("} <= set(re.findall(r"\b\w+OpenAI\(|\b\w+\(", TEXT))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0])
def test_a_block_of_python_runs(served: ServerProcess, block: str) -> None:
    assert URL in block
    assert run(block.replace(URL, served.url)).strip()


PROGRAMS = {
    "OPENAI": "import openai; c = openai.OpenAI(); print(c.models.retrieve('gpt-4o').id)",
    "ANTHROPIC": "import anthropic; c = anthropic.Anthropic(); print(c.models.retrieve('gpt-4o').id)",
    "AZURE_OPENAI": "import openai; c = openai.AzureOpenAI(); print(c.models.retrieve('gpt-4o').id)",
}


@pytest.mark.parametrize("prefix", PROGRAMS)
def test_the_environment_is_enough(served: ServerProcess, prefix: str) -> None:
    lines = dict(re.findall(r"^export (\w+)=(\S+)$", TEXT, re.M))
    assert len(lines) == 7
    wanted = (prefix, "OPENAI_API_VERSION")
    environment = {n: v.replace(URL, served.url) for n, v in lines.items() if n.startswith(wanted)}
    assert run(PROGRAMS[prefix], **environment) == "gpt-4o\n"
