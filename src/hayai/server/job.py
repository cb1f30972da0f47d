"""One HTTP request of any dialect, understood: what every surface translates its bodies into."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hayai.engine.request import SamplingParams
from hayai.frontend import Prompt
from hayai.frontend_request import PLAIN, RequestOptions


@dataclass(frozen=True)
class Job:
    """prompts x n choices; choice i continues prompts[i // n].

    dialect: the key of its encoder in replies.REPLIES ('chat', 'completion', 'responses', 'anthropic').
    model: the name that the client asked for; the route resolves it through the aliases and shows it again in
    the answer. echo: the prompt's text before the answer's (completions). warnings: parameters that were
    accepted without effect, told in the `x-hayai-warning` header. request_id: None = a fresh one. extra: what
    one dialect needs back when it encodes (its own request, mostly); nobody else reads it.
    """

    dialect: str
    model: str | None
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    timings: bool = False
    echo: bool = False
    options: RequestOptions = PLAIN
    warnings: tuple[str, ...] = ()
    request_id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.n
