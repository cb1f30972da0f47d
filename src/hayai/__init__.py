"""Hayai: an LLM inference engine and API server built for the speed of one request.

>>> from hayai import LLM
>>> LLM("default").generate("The capital of France is", max_tokens=8).text   # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hayai.api import LLM, Completion, SamplingParams, Tool, ToolCall

__version__ = "0.1.0"
_API = ("LLM", "Completion", "SamplingParams", "Tool", "ToolCall")
__all__ = ["LLM", "Completion", "SamplingParams", "Tool", "ToolCall", "__version__"]


def __getattr__(name: str) -> object:
    # Imported on first use: starting the command line must not pay for what it doesn't need.
    if name in _API:
        from hayai import api

        return getattr(api, name)
    raise AttributeError(f"module 'hayai' has no attribute {name!r}")
