"""What every route of one server shares: the model, the configuration, who may come in, what is counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hayai.config import ServerConfig
from hayai.frontend import Frontend
from hayai.server.access import Access, Principal
from hayai.server.errors import ApiError
from hayai.server.gate import Gate
from hayai.server.metrics import Metrics
from hayai.server.reply import TokenBytes

DEFAULT_NAME = "default"
"""Every server answers to this model name, beside the name of its file."""


@dataclass(frozen=True)
class ServerContext:
    """Handed to every surface. started: Unix seconds. machine: precision and ISA, as `timings` shows
    them. closers: called when the server stops, by surfaces that hold something open."""

    frontend: Frontend
    config: ServerConfig
    gate: Gate
    access: Access
    metrics: Metrics
    started: int
    fingerprint: str
    token_bytes: TokenBytes
    machine: Mapping[str, Any] = field(default_factory=dict)
    closers: list[Callable[[], None]] = field(default_factory=list)

    def resolve_model(self, name: str | None, principal: Principal, param: str | None = "model") -> str:
        """The real model that `name` stands for; None and 'default' are the one that is served.

        ApiError 404 with the names there are, 403 where the tenant may not use this one.
        """
        real = self.frontend.model_name
        asked = real if name is None or name == DEFAULT_NAME else name
        if asked != real and asked not in self.config.aliases:
            served = ", ".join(self.model_names(principal)) or "nothing that this key may use"
            message = f"no such model: {asked[:100]!r}; served here: {served} (or {DEFAULT_NAME})"
            raise ApiError(404, message, param=param, code="model_not_found")
        if principal.models is not None and principal.models.isdisjoint((asked, real)):
            may = ", ".join(sorted(principal.models))
            raise ApiError(
                403,
                f"this key may not use model {asked!r}; it may use: {may}",
                param=param,
                code="model_not_allowed",
            )
        return real

    def shown_name(self, name: str | None) -> str:
        """How an answer names the model: an alias as it was asked for, anything else by the real name."""
        return name if name is not None and name in self.config.aliases else self.frontend.model_name

    def model_names(self, principal: Principal) -> list[str]:
        """What `principal` may ask for: the real name first, then the aliases in the order of the config."""
        real = self.frontend.model_name
        names = [real, *(alias for alias in self.config.aliases if alias != real)]
        allowed = principal.models
        return [n for n in names if allowed is None or n in allowed or real in allowed]
