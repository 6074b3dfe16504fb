# SPDX-License-Identifier: Apache-2.0
"""Configuration: the later source wins, and every mistake is told with its key, value, origin and fix."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from loracache.cache.policy import ADMISSIONS, POLICIES
from loracache.config import Config, PolicyName, load_config, parse_size
from loracache.errors import ConfigError

SOCKET = {"socket": "/run/lc.sock"}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("LORACACHE_"):
            monkeypatch.delenv(name)


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(content: str | bytes) -> Path:
        path = tmp_path / "loracache.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("65536", 65536), (65536, 65536), ("0", 0), ("4GiB", 4 << 30), ("4 gib", 4 << 30), (" 1.5KiB ", 1536),
        ("512MB", 512_000_000), ("512M", 512_000_000), ("2TiB", 2 << 40), ("1k", 1000), ("7B", 7), (1 << 60, 1 << 60),
    ],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "4XB", "4 GiB GiB", "-1", "1e3", "0x10", "nan", "4iB", None, True, 4.5, [], -1, "9" * 400, 10**400],
)
def test_what_is_no_size_is_refused_with_its_value(text: object) -> None:
    with pytest.raises(ValueError, match=r"is not a size|is negative|is too large") as caught:
        parse_size(text)
    assert str(text)[:20] in str(caught.value)


@given(st.text(max_size=30) | st.integers() | st.floats() | st.binary(max_size=10))
def test_reading_a_size_raises_nothing_but_value_errors(text: object) -> None:
    with contextlib.suppress(ValueError):
        assert parse_size(text) >= 0


def test_the_later_source_wins(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written("memory: 1GiB\ndisk: 1GiB\npage_size: 4096\nsocket: /run/file.sock\n")
    monkeypatch.setenv("LORACACHE_DISK", "2GiB")
    monkeypatch.setenv("LORACACHE_PAGE_SIZE", "8KiB")
    config = load_config({"page_size": "16KiB", "memory": None}, file)
    assert (config.memory, config.disk, config.page_size) == (1 << 30, 2 << 30, 16 << 10)
    assert config.socket == Path("/run/file.sock")
    assert config.drain == 5.0


def test_an_empty_file_sets_nothing(written: Any) -> None:
    assert load_config(SOCKET, written("# nothing\n")) == load_config(SOCKET)


def test_settings_of_the_connector_are_none_of_the_daemons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORACACHE_CONNECTOR_ANYTHING", "x")
    assert load_config(SOCKET).socket == Path("/run/lc.sock")


def test_a_configuration_does_not_change() -> None:
    config = load_config(SOCKET)
    with pytest.raises(ValidationError):
        config.memory = 1  # type: ignore[misc]


def test_every_key_says_what_it_is_for_and_there_are_few() -> None:
    assert len(Config.model_fields) < 35
    assert all(field.description for field in Config.model_fields.values())


@pytest.mark.parametrize("source", ["file", "environment", "command line"])
def test_an_unknown_key_is_told_with_where_it_stands_and_what_was_meant(
    source: str, written: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: dict[str, Any] = dict(SOCKET)
    file = None
    if source == "file":
        file = written("disk_pth: /x\n")
    elif source == "environment":
        monkeypatch.setenv("LORACACHE_DISK_PTH", "/x")
    else:
        flags["disk_pth"] = "/x"
    with pytest.raises(ConfigError, match=rf"unknown key 'disk_pth' in the {source}.*did you mean 'disk_path'"):
        load_config(flags, file)


def test_a_key_like_no_other_is_told_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="known: socket, memory") as caught:
        load_config(SOCKET | {"zzz": 1})
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("memory", "lots", "not a size"),
        ("memory", "1KiB", "greater than or equal to 1048576"),
        ("memory", "9" * 400, "too large"),
        ("page_size", "5000", "power of two"),
        ("page_size", "2KiB", "power of two"),
        ("page_size", "32MiB", "power of two"),
        ("disk", "-5", "not a size"),
        ("disk_sync", "perhaps", "boolean"),
        ("drain", "-1", "greater than or equal to 0"),
        ("drain", "soon", "number"),
        ("redis_lookup_ms", "0", "greater than 0"),
        ("policy", "magic", "'lru'"),
        ("log_level", "loud", "'debug'"),
    ],
)
@pytest.mark.parametrize("source", ["file", "environment", "command line"])
def test_a_bad_value_is_told_with_key_value_and_origin(
    key: str, value: str, why: str, source: str, written: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: dict[str, Any] = dict(SOCKET)
    file = None
    if source == "file":
        file = written(f"{key}: '{value}'\n")
        origin = f"file {file}"
    elif source == "environment":
        monkeypatch.setenv(f"LORACACHE_{key.upper()}", value)
        origin = "environment"
    else:
        flags[key] = value
        origin = "command line"
    with pytest.raises(ConfigError) as caught:
        load_config(flags, file)
    message = str(caught.value)
    assert f"{key}={value!r} ({origin})" in message
    assert why in message


def test_every_bad_value_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"memory='x'.*; drain=-1"):
        load_config(SOCKET | {"memory": "x", "drain": -1})


def test_a_missing_socket_is_told_with_how_to_give_it() -> None:
    with pytest.raises(ConfigError, match="socket is not set; give --socket or LORACACHE_SOCKET"):
        load_config({})


def test_an_arena_of_hardly_a_page_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"memory=\d+ holds fewer than 4 pages of page_size=\d+"):
        load_config(SOCKET | {"memory": "16MiB", "page_size": "16MiB"})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("- a\n- b\n", "must map keys to values"),
        ("1: 2\n", "must map keys to values"),
        ("just text", "must map keys to values"),
        ("memory: [1\n", "is not YAML"),
        ("memory: 1: 2\n", "is not YAML"),
        (b"memory: \xff\n", "is not YAML"),
        ("memory: !!python/object/apply:os.system ['true']\n", "is not YAML"),
        ("[" * 5000, "is not YAML"),
    ],
    ids=["list", "number", "text", "open", "twice", "bytes", "python", "deep"],
)
def test_a_file_that_is_no_map_is_refused_by_name(content: str | bytes, why: str, written: Any) -> None:
    file = written(content)
    with pytest.raises(ConfigError, match=why) as caught:
        load_config(SOCKET, file)
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml cannot be read: No such file"):
        load_config(SOCKET, tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(SOCKET, tmp_path)


@pytest.mark.parametrize("key", ["integrity_key", "redis"])
@pytest.mark.parametrize("value", [["hunter2"], {"hunter2": 1}, 5.5])
def test_secrets_are_never_shown_in_a_message(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{key}=\(secret\) \(command line\)") as caught:
        load_config(SOCKET | {key: value})
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "content", ["redis: redis://:hunter2@host: 1\n", "integrity_key: 'hunter2\n", "x: [hunter2, *a]\n"]
)
def test_secrets_are_not_shown_where_the_file_is_no_yaml(content: str, written: Any) -> None:
    with pytest.raises(ConfigError, match=r"is not YAML.*in line \d") as caught:
        load_config(SOCKET, written(content))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2@host",
        "rediss://user:hunter2@host:1/0",
        "unix://user:hunter2@/path",
        "redis://:hun/ter2@host",
        "redis+sentinel://:hunter2@host,other/service",
        "redis://host?password=hunter2",
        "redis+sentinel://host/service?db=1&sentinel_password=hunter2",
    ],
)
def test_a_password_on_the_command_line_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"redis on the command line .* give redis by LORACACHE_REDIS") as caught:
        load_config(SOCKET | {"redis": url})
    assert "ter2" not in str(caught.value)


def test_a_url_without_a_password_may_stand_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("redis://user@host:1/0", "redis://[::1]:6379", "rediss+cluster://a:1,b:2?ssl_cert_reqs=none"):
        assert load_config(SOCKET | {"redis": url}).redis == url
    monkeypatch.setenv("LORACACHE_REDIS", "redis://:hunter2@host")
    monkeypatch.setenv("LORACACHE_REDIS_PASSWORD_FILE", "/secret")
    config = load_config(SOCKET)
    assert (config.redis, config.redis_password_file) == ("redis://:hunter2@host", Path("/secret"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("traces", "http://user:hunter2@collector:4318"),
        ("http", "redis://:hunter2@host"),  # one key's value in another's place
        ("disk", "redis://:hunter2@host"),
    ],
)
@pytest.mark.parametrize("source", ["environment", "command line"])
def test_a_login_in_any_value_is_refused_and_not_repeated(
    key: str, value: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A REST process is told the address of traces by its command line."""
    monkeypatch.setenv(f"LORACACHE_{key.upper()}", value)
    with pytest.raises(ConfigError, match=rf"{key}=\(secret\) \({source}\)") as caught:
        load_config(SOCKET | ({key: value} if source == "command line" else {}))
    assert "hunter2" not in str(caught.value)


def test_secrets_are_not_shown_with_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORACACHE_REDIS", "redis://:hunter2@host:6379")
    config = load_config(SOCKET | {"integrity_key": "hunter2" * 4})
    assert "hunter2" not in repr(config) + str(config)
    assert config.integrity_key is not None
    assert config.integrity_key.get_secret_value() == "hunter2" * 4


def test_the_policies_that_can_be_set_are_those_there_are() -> None:
    assert set(get_args(PolicyName)) == set(POLICIES)
    assert set(get_args(Config.model_fields["admission"].annotation)) == set(ADMISSIONS)
    for policy in POLICIES:
        assert load_config({**SOCKET, "policy": policy, "disk_policy": policy}).disk_policy == policy
    with pytest.raises(ConfigError, match="policy='best'"):
        load_config({**SOCKET, "policy": "best"})
