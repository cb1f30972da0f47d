"""One configuration from defaults, file, environment and flags."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from hayai.config import EngineConfig, LimitsConfig, ServerConfig, hide_password, read_environment
from hayai.config_file import SETTINGS, Resolved, resolve
from hayai.errors import ConfigError

FULL = """
[server]
host = "::1"
port = 9000
queue_seconds = 3          # a whole number where any is allowed
request_timeout = 60.5
require_keys = true
state_dir = "state"
log_requests = "/var/log/hayai/requests.jsonl"

[engine]
model = "models/big.gguf"
max_sequences = 32
prefix_cache = false
kv_format = "q8"

[limits]
max_tools = 4

[aliases]
"gpt-4o" = "default"
claude-sonnet = "default"

[tls]
cert = "tls/cert.pem"
key = "tls/key.pem"

[database]
url = "postgresql://hayai:s3cret@db/hayai?sslkey=s3cret"
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hayai.toml"
    path.write_text(text)
    return path


def environment(tmp_path: Path, **more: str) -> Any:
    return read_environment({"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "xdg"), **more})


def shown(resolved: Resolved) -> dict[str, tuple[str, str]]:
    return {name: (value, source) for name, value, source in resolved.rows()}


def test_nothing_given_is_the_defaults(tmp_path: Path) -> None:
    resolved = resolve(environment(tmp_path))
    assert resolved.engine == EngineConfig()
    assert resolved.server == ServerConfig(state_dir=tmp_path / "xdg" / "hayai")
    assert {source for _, source in shown(resolved).values()} == {"default"}


def test_a_file_sets_everything(tmp_path: Path) -> None:
    path = written(tmp_path, FULL)
    resolved = resolve(environment(tmp_path), path)
    server, engine = resolved.server, resolved.engine
    assert (server.host, server.port, server.queue_seconds, server.request_timeout) == (
        "::1",
        9000,
        3.0,
        60.5,
    )
    assert type(server.queue_seconds) is float and server.require_keys is True
    assert (server.tls_cert, server.tls_key) == (tmp_path / "tls/cert.pem", tmp_path / "tls/key.pem")
    assert server.state_dir == tmp_path / "state"
    assert server.log_requests == Path("/var/log/hayai/requests.jsonl")
    assert engine == EngineConfig(
        str(tmp_path / "models/big.gguf"), max_sequences=32, prefix_cache=False, kv_format="q8"
    )
    assert server.limits == LimitsConfig(max_tools=4)
    assert server.aliases == {"gpt-4o": "default", "claude-sonnet": "default"}
    rows = shown(resolved)
    assert rows["server.port"] == ("9000", str(path)) and rows["limits.max_tools"] == ("4", str(path))
    assert rows["server.queue_seconds"] == ("3.0", str(path)) and rows["engine.threads"] == ("-", "default")
    assert rows["aliases"] == ("gpt-4o = default, claude-sonnet = default", str(path))
    assert rows["database.url"] == ("postgresql://hayai:***@db/hayai", str(path))
    assert not any("s3cret" in value for value, _ in rows.values())


def test_every_setting_is_printed(tmp_path: Path) -> None:
    rows = shown(resolve(environment(tmp_path)))
    counts = [len(fields(owner)) for owner in (EngineConfig, ServerConfig, LimitsConfig)]
    assert len(rows) == sum(counts) - 1 == len(SETTINGS) + 1  # ServerConfig.limits is a section


def test_flags_before_environment_before_file(tmp_path: Path) -> None:
    path = written(tmp_path, '[engine]\nthreads = 3\n[database]\nurl = "a.db"\n[server]\nport = 1\n')
    env = environment(tmp_path, HAYAI_THREADS="4", HAYAI_DATABASE="b.db", HAYAI_ISA="avx2")
    resolved = resolve(env, path)
    assert (resolved.engine.threads, resolved.engine.isa, resolved.server.database) == (4, "avx2", "b.db")
    assert resolved.sources["engine.threads"] == "HAYAI_THREADS"
    flags = {"engine.threads": ("--threads", 5), "server.port": ("--port", 0)}
    resolved = resolve(env, path, flags, {"x": "default"})
    assert (resolved.engine.threads, resolved.server.port, resolved.server.database) == (5, 0, "b.db")
    rows = shown(resolved)
    assert rows["engine.threads"] == ("5", "--threads") and rows["aliases"] == ("x = default", "--alias")
    assert resolve(environment(tmp_path), path).server.database == str(tmp_path / "a.db")


def test_the_default_database_is_used_once_it_exists(tmp_path: Path) -> None:
    env = environment(tmp_path)
    assert resolve(env).server.database is None
    path = tmp_path / "xdg" / "hayai" / "hayai.db"
    path.parent.mkdir(parents=True)
    path.touch()
    resolved = resolve(env)
    assert resolved.server.database == str(path)
    assert resolved.sources["database.url"] == "found in server.state_dir"
    elsewhere = resolve(env, None, {"server.state_dir": ("--state-dir", tmp_path)})
    assert elsewhere.server.database is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nprot = 1", "unknown key prot in [server]; did you mean port?"),
        ("[serve]\nport = 1", "unknown section [serve]; did you mean server?"),
        ("[server]\nzzz = 1", "unknown key zzz in [server]; known: "),
        ("port = 1", "unknown section [port]"),
        ("server = 1", "server must be a section"),
        ("[server]\nport = '1'", "server.port must be a whole number: '1'"),
        ("[server]\nport = true", "server.port must be a whole number: True"),
        ("[server]\nport = 1.5", "server.port must be a whole number: 1.5"),
        ("[server]\nqueue_seconds = nan", "server.queue_seconds must be a number: nan"),
        ("[server]\nqueue_seconds = -1", "queue_seconds must not be negative"),
        ("[server]\nhost = 1", "server.host must be a text: 1"),
        ("[server]\nrequire_keys = 1", "server.require_keys must be true or false: 1"),
        ("[server]\nstate_dir = 1", "server.state_dir must be a path: 1"),
        ("[server]\nlimits = 1", "unknown key limits"),
        ("[server]\ntls_cert = 'x'", "unknown key tls_cert"),
        ("[limits]\nmax_tools = -1", "limits.max_tools must not be negative"),
        ("[limits]\nmax_tool = 1", "did you mean max_tools?"),
        ("[aliases]\nx = 1", "[aliases] maps names to names"),
        ("aliases = 1", "[aliases] maps names to names"),
        ("[tls]\ncert = 'x'", "there is no key"),
        ("[tls]\nkey = 'x'", "there is no cert"),
        ("[server\n", "is not valid TOML"),
        ("[server]\nport = 1\nport = 2", "is not valid TOML"),
    ],
)
def test_what_a_file_gets_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        resolve(environment(tmp_path), path)
    assert message in str(caught.value)


def test_files_that_cant_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't read the configuration"):
        resolve(environment(tmp_path), tmp_path / "missing.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        resolve(environment(tmp_path), binary)


def test_environment(tmp_path: Path) -> None:
    env = read_environment({"HAYAI_HOME": "/h"})
    assert (env.home, env.state, env.database) == (Path("/h"), Path("/h/state"), None)
    env = environment(tmp_path, XDG_CACHE_HOME="/c")
    assert (env.home, env.state) == (Path("/c/hayai"), tmp_path / "xdg" / "hayai")
    with pytest.raises(ConfigError, match="unknown environment variable HAYAI_DATABAES"):
        read_environment({"HAYAI_DATABAES": "x"})


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("file.db", "file.db"),
        ("sqlite:///file.db", "sqlite:///file.db"),
        ("postgresql://host/db", "postgresql://host/db"),
        ("postgresql://user@host:1/db", "postgresql://user@host:1/db"),
        ("postgresql://user:s3cret@host/db", "postgresql://user:***@host/db"),
        ("postgresql://user:s3c@r:e/t@host/db", "postgresql://user:***@host/db"),
        ("postgresql://user:s3c?ret@host/db", "postgresql://***"),
        ("postgresql://host/db?password=s3cret", "postgresql://host/db"),
        ("postgresql://host:1/db?user=u&password=s3@cret", "postgresql://***"),
    ],
)
def test_passwords_are_not_printed(url: str, expected: str) -> None:
    assert hide_password(url) == expected
