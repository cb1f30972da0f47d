"""OpenAI's npm package against a real server: `make test-npm`.

Not among the tests that run by default: it needs node and npm, and the package from npm's registry.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from server_process import ServerProcess

PACKAGE = "openai@^6"
SCRIPT = Path(__file__).with_name("npm_openai.mjs")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which node finds the package and the script."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    path = tmp_path_factory.mktemp("npm")
    command = [npm, "install", "--no-audit", "--no-fund", "--silent", PACKAGE]
    found = subprocess.run(command, cwd=path, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, f"{' '.join(command)}: {found.stdout}{found.stderr}"
    shutil.copy(SCRIPT, path)
    return path


def test_every_endpoint_through_the_npm_package(server: ServerProcess, folder: Path) -> None:
    command = ["node", SCRIPT.name, f"{server.url}/v1"]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.splitlines()[-1].startswith("passed ") and found.stderr == ""
