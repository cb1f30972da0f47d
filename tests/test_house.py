"""Rules of the house that a machine can check: sizes, paths, environment, versions, a map that is true."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import hayai

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("src", "native", "tests", "docs", ".ci")
FILES = (
    "Makefile", "CMakeLists.txt", "pyproject.toml",
    "README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md",
)  # fmt: skip
TEXT = {".py", ".pyi", ".h", ".cpp", ".md", ".toml", ".txt", ".json", ""}
MAX_LINES = 800


def text_files() -> Iterator[Path]:
    yield from (ROOT / name for name in FILES)
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in TEXT and "__pycache__" not in path.parts:
                yield path


def sources(folder: str, *suffixes: str) -> list[str]:
    found = [p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes and "__pycache__" not in p.parts]
    return sorted(p.relative_to(ROOT).as_posix() for p in found)


@pytest.mark.parametrize("path", list(text_files()), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_file_is_short_and_names_no_machine(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix in {".py", ".h", ".cpp"}:
        assert len(lines) <= MAX_LINES, f"{len(lines)} lines: look for the split"
    for number, line in enumerate(lines, 1):
        found = re.search(r"(?<![\w.~}])/(?:work|root|home|Users|tmp|mnt)/\w", line)
        assert not found, f"line {number} names a path of one machine: {line.strip()[:80]}"


def test_only_config_reads_the_environment() -> None:
    """Others may hand it on to a process that they start, but not look anything up in it."""
    lookup = re.compile(r"os\.getenv|os\.environ\s*(\[|\.get\b|\.pop\b|\.setdefault\b)")
    readers = [name for name in sources("src", ".py") if lookup.search((ROOT / name).read_text())]
    assert set(readers) <= {"src/hayai/config.py"}
    assert not [name for name in sources("native", ".cpp", ".h") if "getenv" in (ROOT / name).read_text()]


def test_environment_variables_are_few_and_documented() -> None:
    names = set(re.findall(r"HAYAI_[A-Z]+", (ROOT / "src/hayai/config.py").read_text()))
    readme = (ROOT / "README.md").read_text()
    assert len(names) <= 10
    assert not [name for name in names if name not in readme]


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == hayai.__version__
    assert f"## {hayai.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", *sources("docs", ".md")])
def test_pages_name_only_what_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
    for name in re.findall(r"`((?:src|native|tests|docs)/[\w./-]+\.\w+)`", text):
        assert (ROOT / name).exists(), f"{page} names {name}"
    for target in re.findall(r"`make (\w+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"{page} says make {target}"


def map_entries() -> dict[str, str]:
    """Path -> caption, from the tree in docs/map.md (two spaces of indent per folder)."""
    entries: dict[str, str] = {}
    tree = (ROOT / "docs/map.md").read_text().split("```text\n")[1].split("```")[0]
    folders: list[str] = []
    for line in tree.splitlines():
        found = re.fullmatch(r"( *)(\S+)\s*(.*)", line)
        if found is None:
            continue
        depth, name = len(found[1]) // 2, found[2]
        if depth > len(folders):
            entries[next(reversed(entries))] += " " + line.strip()  # a caption that goes on
            continue
        folders = [*folders[:depth], name] if name.endswith("/") else folders[:depth]
        entries["".join(folders) + ("" if name.endswith("/") else name)] = found[3]
    return entries


def test_map_has_one_caption_for_every_file() -> None:
    entries = map_entries()
    wanted = sources("src", ".py", ".toml") + sources("native", ".cpp", ".h")
    wanted = [name for name in wanted if not name.endswith("/__init__.py") or name == "src/hayai/__init__.py"]
    assert sorted(set(wanted) - set(entries)) == []
    assert [name for name in entries if not (ROOT / name).exists()] == []
    assert [name for name, caption in entries.items() if not caption and not name.endswith("/")] == []
