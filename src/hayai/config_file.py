"""From defaults, a TOML file, the environment and flags to one configuration, each value with its source.

What counts more stands later: default, file, environment, flag. Sections of the file and what they set:

    [server]    ServerConfig, field by field
    [engine]    EngineConfig, field by field
    [limits]    LimitsConfig, field by field
    [aliases]   name that clients ask for = name of the model that is served
    [tls]       cert, key: PEM files
    [database]  url

Paths in a file are relative to the file's folder. An unknown section or key is an error with the near name.
"""

from __future__ import annotations

import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from hayai.config import EngineConfig, Environment, LimitsConfig, ServerConfig, hide_password
from hayai.errors import ConfigError

DEFAULT_DATABASE = "hayai.db"
"""In the state folder; used when it exists, and made by `hayai keys create`."""

_MOVED = {"tls_cert": ("tls", "cert"), "tls_key": ("tls", "key"), "database": ("database", "url")}
"""Fields of ServerConfig that have a section of their own."""
_SECTIONS: Mapping[str, type] = {"server": ServerConfig, "engine": EngineConfig, "limits": LimitsConfig}
_PATHS = ("engine.model", "database.url")
"""Texts that name a file, unless they are 'default' or a URL."""


@dataclass(frozen=True)
class Setting:
    """One value of the configuration: where it is written in a file, and what it may be."""

    section: str
    key: str
    owner: type
    field: str
    types: tuple[type, ...]

    @property
    def name(self) -> str:
        return f"{self.section}.{self.key}"


@dataclass(frozen=True)
class Resolved:
    """The configuration, and where each setting ('server.port') was decided: 'default', the file, the
    environment variable or the flag."""

    engine: EngineConfig
    server: ServerConfig
    sources: Mapping[str, str]

    def rows(self) -> list[tuple[str, str, str]]:
        """(setting, value, source) of everything, to be printed; no secret is among it."""
        values = {name: _value_of(self, setting) for name, setting in SETTINGS.items()}
        values["aliases"] = self.server.aliases
        return [(n, _shown(n, v), self.sources.get(n, "default")) for n, v in values.items()]


def _settings() -> dict[str, Setting]:
    found = []
    for section, owner in _SECTIONS.items():
        hints = typing.get_type_hints(owner)
        for field in fields(owner):
            kinds = _types_of(hints[field.name])
            if kinds:
                place = _MOVED.get(field.name, (section, field.name)) if owner is ServerConfig else None
                found.append(Setting(*(place or (section, field.name)), owner, field.name, kinds))
    return {setting.name: setting for setting in found}


def _types_of(hint: Any) -> tuple[type, ...]:
    """The plain types that a field takes, without None; none for nested configuration and mappings."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = tuple(k for k in kinds if isinstance(k, type) and k is not types.NoneType)
    return () if any(is_dataclass(k) or issubclass(k, Mapping) for k in plain) else plain


SETTINGS: Mapping[str, Setting] = _settings()
"""Every setting by its name, 'section.key'."""


def resolve(
    environment: Environment,
    file: Path | None = None,
    flags: Mapping[str, tuple[str, Any]] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Resolved:
    """The configuration of a server. flags: setting -> (the flag as the user knows it, value), only those
    that were given; aliases: more of them, from flags. ConfigError names the file and the key at fault."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    names: dict[str, str] = {}
    if file is not None:
        written = _read(file)
        names = _aliases(written.pop("aliases", {}), file)
        values = _from_file(written, file)
        sources = dict.fromkeys(values, str(file)) | ({"aliases": str(file)} if names else {})
    for name, variable, value in (
        ("engine.threads", "HAYAI_THREADS", environment.threads),
        ("engine.isa", "HAYAI_ISA", environment.isa),
        ("database.url", "HAYAI_DATABASE", environment.database),
    ):
        if value is not None:
            values[name], sources[name] = value, variable
    for name, (flag, value) in (flags or {}).items():
        values[name], sources[name] = value, flag
    if aliases:
        sources["aliases"] = f"{file}, --alias" if names else "--alias"
    values.setdefault("server.state_dir", environment.state)
    default_database = Path(values["server.state_dir"]) / DEFAULT_DATABASE
    if "database.url" not in values and default_database.exists():
        values["database.url"], sources["database.url"] = str(default_database), "found in server.state_dir"
    limits = LimitsConfig(**_fields(values, LimitsConfig))
    server = ServerConfig(
        **_fields(values, ServerConfig), limits=limits, aliases={**names, **(aliases or {})}
    )
    return Resolved(EngineConfig(**_fields(values, EngineConfig)), _check(server), sources)


def default_database(environment: Environment, file: Path | None, flag: str | None) -> str:
    """The database that verbs beside `serve` work on: as `resolve` finds it, and the default one also where
    it does not exist yet."""
    given = {"database.url": ("--database", flag)} if flag is not None else {}
    config = resolve(environment, file, given).server
    return config.database or str(Path(config.state_dir or environment.state) / DEFAULT_DATABASE)


def _fields(values: Mapping[str, Any], owner: type) -> dict[str, Any]:
    return {
        setting.field: values[name]
        for name, setting in SETTINGS.items()
        if setting.owner is owner and name in values
    }


def _check(config: ServerConfig) -> ServerConfig:
    if (config.tls_cert is None) != (config.tls_key is None):
        missing = "key" if config.tls_key is None else "cert"
        raise ConfigError(f"TLS needs a certificate and its key; there is no {missing}")
    numbers = {**vars(config), **{f"limits.{n}": v for n, v in vars(config.limits).items()}}
    for name, value in numbers.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value < 0:
            raise ConfigError(f"{name} must not be negative: {value}")
    return config


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"can't read the configuration {file}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from None


def _from_file(written: Mapping[str, Any], file: Path) -> dict[str, Any]:
    sections = sorted({setting.section for setting in SETTINGS.values()} | {"aliases"})
    values = {}
    for section, entries in written.items():
        if section not in sections:
            raise ConfigError(f"{file}: unknown section [{section}]{_near(section, sections)}")
        if not isinstance(entries, dict):
            raise ConfigError(f"{file}: {section} must be a section, [{section}], with keys below it")
        known = [s.key for s in SETTINGS.values() if s.section == section]
        for key, value in entries.items():
            setting = SETTINGS.get(f"{section}.{key}")
            if setting is None:
                raise ConfigError(f"{file}: unknown key {key} in [{section}]{_near(key, known)}")
            values[setting.name] = _typed(setting, value, file)
    return values


def _typed(setting: Setting, value: Any, file: Path) -> Any:
    """A value of the file as its field wants it. A number must not be true or false, nor a text."""
    if isinstance(value, str) and Path in setting.types:
        return file.parent / Path(value).expanduser()
    if isinstance(value, str) and setting.name in _PATHS and value != "default" and "://" not in value:
        return str(file.parent / Path(value).expanduser())
    if type(value) is int and float in setting.types and int not in setting.types:
        value = float(value)
    if type(value) not in setting.types or (isinstance(value, float) and not math.isfinite(value)):
        wanted = " or ".join(_WORDS[kind] for kind in setting.types)
        raise ConfigError(f"{file}: {setting.name} must be {wanted}: {value!r}")
    return value


_WORDS: Mapping[type, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    Path: "a path",
}


def _aliases(entries: Any, file: Path) -> dict[str, str]:
    if not isinstance(entries, dict) or not all(isinstance(v, str) and v for v in entries.values()):
        raise ConfigError(f'{file}: [aliases] maps names to names: "gpt-4o" = "default"')
    return entries


def _near(name: str, known: typing.Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"


def _value_of(resolved: Resolved, setting: Setting) -> Any:
    owner: Any = {
        EngineConfig: resolved.engine,
        ServerConfig: resolved.server,
        LimitsConfig: resolved.server.limits,
    }[setting.owner]
    return getattr(owner, setting.field)


def _shown(name: str, value: Any) -> str:
    if name == "database.url" and value is not None:
        return hide_password(value)
    if name == "aliases" and value:
        return ", ".join(f"{alias} = {model}" for alias, model in value.items())
    return "-" if value in (None, "", {}) else str(value)
