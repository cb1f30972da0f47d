"""Who asks, what they may, and what it costs: keys, tenants, quotas and the ledger behind one small face.

A route calls `authenticate` before it reads a body, `admit` before it generates, and settles the ticket once
the answer is over. An open server (no keys) takes the same path; each step is then a constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

OPEN_TENANT = "local"
"""The tenant of everybody on a server without keys."""


@dataclass(frozen=True)
class Principal:
    """Who sent a request.

    priority: see engine.request.EngineRequest. cache_salt: cached prefixes are shared only inside it. models:
    the names that the tenant may ask for; None = all.
    """

    tenant: str = OPEN_TENANT
    key_id: str | None = None
    priority: int = 0
    cache_salt: str = ""
    models: frozenset[str] | None = None


class Ticket:
    """A request that was let in. `headers` (x-ratelimit-*, empty without limits) belong in its response."""

    def __init__(self, headers: Mapping[str, str] | None = None) -> None:
        self.headers: Mapping[str, str] = headers or {}

    def settle(
        self,
        prompt_tokens: int,
        cached_tokens: int,
        completion_tokens: int,
        status: str,
        first_token_ms: float | None = None,
    ) -> None:
        """What the client got in the end. Quick and never raises; only the first call counts.

        Tokens are those of all choices, completion tokens those that were sent to the client. status:
        'completed', 'disconnected', 'aborted', 'timeout', 'failed', or another short word.
        """

    async def flushed(self) -> None:
        """Return once the ledger's row is durable; at once where there is no ledger."""


class Access:
    """The keys, quotas and ledger of one server."""

    @classmethod
    def open(cls) -> Access:
        """For a server without keys and without a ledger: everything is free, any key is accepted."""
        return cls()

    def authenticate(self, headers: Mapping[str, str]) -> Principal:
        """Who sends these headers (names in lower case, or a case-insensitive mapping): `Authorization:
        Bearer`, `x-api-key` or `api-key`. ApiError 401 where keys are required and none of them is valid."""
        return Principal()

    def admit(
        self,
        principal: Principal,
        *,
        request_id: str,
        endpoint: str,
        model: str,
        num_choices: int = 1,
        prompt_tokens: int = 0,
        max_tokens: int = 0,
    ) -> Ticket:
        """Let a request in, or ApiError 429 with Retry-After (400 where it is too large to ever get in).

        prompt_tokens: of all its prompts; max_tokens: the most per choice. Both are reserved in the tenant's
        quota until the ticket is settled. request_id: unique for ever.
        """
        return Ticket()

    def close(self) -> None:
        """Write what is left of the ledger. The caller has settled all tickets."""
