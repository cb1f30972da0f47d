"""Tenants, their limits and their keys as plain records; how a key looks and what is kept of it.

A key is `hk-<id>-<secret>`: the id finds its record, the secret is 256 random bits. Kept is the SHA-256 of
the whole key. A slow hash (bcrypt, argon2) protects passwords because people choose guessable ones; 256
random bits can't be guessed at any speed, and a slow hash would cost every request tens of milliseconds on
the event loop, for wrong keys too: a denial of service by design.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from hayai.errors import ConfigError

KEY_PREFIX = "hk-"
MAX_KEY_CHARS = 128
MAX_NAME_CHARS = 100

Priority = Literal["interactive", "batch"]
PRIORITIES: tuple[Priority, ...] = ("interactive", "batch")

_KEY = re.compile(r"hk-([a-z2-7]{16})-[A-Za-z0-9_-]{43}")
_MAX_LIMIT = 1 << 53


@dataclass(frozen=True)
class Limits:
    """What a tenant may use, all its keys together; None = no limit.

    requests_per_minute, tokens_per_minute: token buckets that hold one minute's worth, so a pause may be
    followed by a burst of that size. max_parallel: choices that are generated at the same time. token_budget:
    tokens (prompt and completion) per calendar month, UTC.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_parallel: int | None = None
    token_budget: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 1 <= value <= _MAX_LIMIT:
                raise ConfigError(f"{name} must be at least 1 (or none = no limit): {value}")


@dataclass(frozen=True)
class Tenant:
    """Somebody who is counted and limited as one. models: the names it may ask for; None = all."""

    name: str
    limits: Limits = field(default_factory=Limits)
    priority: Priority = "interactive"
    models: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if self.priority not in PRIORITIES:
            raise ConfigError(f"priority must be {' or '.join(PRIORITIES)}: {self.priority!r}")
        if self.models is not None and not self.models:
            raise ConfigError(
                f"tenant {self.name!r} may use no model at all; leave `models` out for all of them"
            )


@dataclass(frozen=True)
class ApiKey:
    """A key as it is kept. created and revoked: seconds since 1970, UTC."""

    key_id: str
    tenant: str
    name: str
    digest: str
    created: float
    revoked: float | None = None


@dataclass(frozen=True)
class Snapshot:
    """All tenants and keys at one moment. secret: of this installation; salts are derived from it."""

    revision: int
    secret: bytes
    tenants: Mapping[str, Tenant]
    keys: Mapping[str, ApiKey]

    def cache_salt(self, tenant: str) -> str:
        """The salt of a tenant's cached prefixes: the same in every process of this installation, and not to
        be guessed from the tenant's name."""
        return hmac.new(self.secret, b"cache-salt\0" + tenant.encode(), hashlib.sha256).hexdigest()


def make_key() -> tuple[str, str]:
    """A new random key and its id."""
    key_id = base64.b32encode(secrets.token_bytes(10)).decode().lower()
    return f"{KEY_PREFIX}{key_id}-{secrets.token_urlsafe(32)}", key_id


def key_id_of(key: str) -> str | None:
    """The id part of a text that has the form of a key, None of any other text."""
    found = _KEY.fullmatch(key) if len(key) <= MAX_KEY_CHARS else None
    return found[1] if found else None


def digest_of(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def check_name(name: str, what: str = "tenant") -> str:
    """A name of a tenant or key in its normal form (Unicode NFC); ConfigError for what can't be shown."""
    name = unicodedata.normalize("NFC", name)
    if not 1 <= len(name) <= MAX_NAME_CHARS or not name.isprintable() or name != name.strip():
        raise ConfigError(
            f"the name of a {what} must have 1 to {MAX_NAME_CHARS} printable characters and no space at its "
            f"ends: {name[:MAX_NAME_CHARS]!r}"
        )
    return name
