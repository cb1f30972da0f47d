"""Messages for whoever runs the process, through the standard library's logging.

`logging` is imported with the first message: most runs have none, and it holds half a megabyte.
"""

from __future__ import annotations

from typing import Literal


def log(
    level: Literal["warning", "error", "critical"],
    name: str,
    message: str,
    *values: object,
    exc_info: BaseException | None = None,
) -> None:
    """Log `message % values` as logger `name` would."""
    import logging  # see the module

    getattr(logging.getLogger(name), level)(message, *values, exc_info=exc_info)
