"""Errors that a user can meet. Each says what was tried, what was found and what is supported.

`assert` is for our own bugs; everything a file, a request or a configuration can cause is one of these.
"""

from __future__ import annotations


class HayaiError(Exception):
    """Base of every error that is the input's fault, not ours."""


class ConfigError(HayaiError):
    """An option, configuration key or environment variable that we can't accept."""


class ModelError(HayaiError):
    """A model file that can't be loaded: damaged, hostile, or of a kind that is not supported."""


class PlanError(HayaiError):
    """A plan that does not hold together, or an op that a backend lacks."""


class RequestError(HayaiError):
    """A request that can't be served as asked.

    `param` is the field at fault (as the caller spells it), `code` a short stable identifier.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
