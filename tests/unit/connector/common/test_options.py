# SPDX-License-Identifier: Apache-2.0
"""kv_connector_extra_config: what is wrong is named, with the value and the fix."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from loracache.connectors.vllm.common.options import Options, is_ours
from loracache.errors import ConfigError


def test_nothing_is_required() -> None:
    assert Options.parse({}) == Options()


def test_numbers_may_be_whole() -> None:
    assert Options.parse({"load_timeout": 5, "lookup_wait": 0}) == Options(load_timeout=5, lookup_wait=0)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"sever": "unix:///x"}, ["'sever'", "did you mean 'server'", "known: server"]),
        ({"zzz": 1}, ["'zzz'", "known: server"]),
        ({"server": 5}, ["server=5", "must be a str"]),
        ({"server": "http://host"}, ["server='http://host'", "give unix:///absolute/path.sock"]),
        ({"server": "relative.sock"}, ["server='relative.sock'", "give unix:///absolute/path.sock"]),
        ({"server": "unix:///" + "x" * 107}, ["server=", "at most 107 bytes"]),
        ({"server": "unix:///x", "memory": "1GiB"}, ["memory='1GiB'", "loracache serve", "leave server out"]),
        ({"server": "unix:///x", "redis": ""}, ["redis=''", "loracache serve"]),
        ({"server": "unix:///x", "http": "127.0.0.1:9400"}, ["http=", "loracache serve"]),
        ({"http": "9400"}, ["http", "'9400'", "127.0.0.1:9400"]),
        ({"memory": "much"}, ["memory", "'much'", "4GiB"]),
        ({"memory": 4096}, ["memory=4096", "must be a str"]),
        ({"disk": "-1GiB"}, ["disk", "'-1GiB'", "write it like"]),
        ({"disk_path": None}, ["disk_path=None", "must be a str"]),
        ({"chunk_tokens": -16}, ["chunk_tokens=-16", "negative"]),
        ({"chunk_tokens": True}, ["chunk_tokens=True", "must be a int"]),
        ({"chunk_tokens": 16.0}, ["chunk_tokens=16.0", "must be a int"]),
        ({"chunk_tokens": "16"}, ["chunk_tokens='16'", "must be a int"]),
        ({"lookup_wait": -0.1}, ["lookup_wait=-0.1", "within 0 and 10 seconds"]),
        ({"recompute_if_faster": 0.5}, ["recompute_if_faster=0.5", "within 1 and 1000, or 0 to load"]),
        ({"recompute_if_faster": float("nan")}, ["recompute_if_faster=nan", "within 1 and 1000"]),
        ({"recompute_if_faster": True}, ["recompute_if_faster=True"]),
        ({"lookup_wait_most": 11}, ["lookup_wait_most=11", "within 0 and 10 seconds"]),
        ({"lookup_wait": float("nan")}, ["lookup_wait=nan", "within 0 and 10 seconds"]),
        ({"kv_layout": "NHD"}, ["kv_layout='NHD'", "BLNHC, BLHNC", "VLLM_KV_CACHE_LAYOUT"]),
        ({"load_timeout": 0}, ["load_timeout=0", "within 0 and 600 seconds"]),
        ({"load_timeout": 601}, ["load_timeout=601", "within 0 and 600 seconds"]),
        ({"load_timeout": "10"}, ["load_timeout='10'", "must be a float"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_fix(extra: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Options.parse(extra)
    assert str(caught.value).startswith("kv_connector_extra_config: ") or "server=" in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "extra",
    [
        {"redis": "redis://:hunter2@host"},
        {"redis": "redis+cluster://a:1,b:2?password=hunter2"},
        {"server": "unix:///x", "redis": "redis://:hunter2@host"},  # wrong for two reasons
        {"server": "redis://:hunter2@host"},
        {"redis": ["redis://:hunter2@host"]},
    ],
)
def test_a_password_is_refused_and_not_repeated(extra: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"LORACACHE_REDIS .*redis_password_file") as caught:
        Options.parse(extra)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("value", [["hunter2"], {"password": "hunter2"}])
def test_what_stands_in_the_place_of_a_url_is_not_shown(value: object) -> None:
    with pytest.raises(ConfigError, match=r"redis=\(secret\) must be a str") as caught:
        Options.parse({"redis": value})
    assert "hunter2" not in str(caught.value)


def test_an_engine_is_ours_alone_and_inside_a_multiconnector() -> None:
    def config(name: str, **extra: object) -> SimpleNamespace:
        return SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector=name, kv_connector_extra_config=extra))

    assert is_ours(config("LoRACacheConnector"))
    assert is_ours(config("MultiConnector", connectors=[{"kv_connector": "X"}, {"kv_connector": "LoRACacheConnector"}]))
    assert not is_ours(config("MultiConnector", connectors=[{"kv_connector": "X"}]))
    assert not is_ours(config("NixlConnector"))
    assert not is_ours(SimpleNamespace(kv_transfer_config=None))
    assert not is_ours(None)
