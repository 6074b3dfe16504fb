# SPDX-License-Identifier: Apache-2.0
"""`lora_pool`: how much, and whether this engine has a pool at all, wherever in its configuration we are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from loracache.connectors.vllm.common.options import Options, own_options, pool_bytes
from loracache.errors import ConfigError

OURS = "LoRACacheConnector"


def engine(connector: str | None, extra: dict[str, Any] | None) -> SimpleNamespace:
    """A VllmConfig, as far as it is looked at."""
    transfer = SimpleNamespace(kv_connector=connector, kv_connector_extra_config=extra)
    return SimpleNamespace(kv_transfer_config=transfer)


def inside(*connectors: tuple[str, dict[str, Any] | None]) -> SimpleNamespace:
    inner = [{"kv_connector": name, "kv_connector_extra_config": extra} for name, extra in connectors]
    return engine("MultiConnector", {"connectors": inner})


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (engine(OURS, {"lora_pool": "3GiB"}), 3 << 30),
        (engine(OURS, {"lora_pool": "512 MiB", "lookup_wait": 0}), 512 << 20),
        (engine(OURS, {"server": "unix:///s"}), 0),
        (engine(OURS, {"lora_pool": ""}), 0),
        (engine(OURS, {}), 0),
        (engine(OURS, None), 0),
        (inside(("OffloadingConnector", {"lora_pool": "1GiB"}), (OURS, {"lora_pool": "2GiB"})), 2 << 30),
        (inside((OURS, None), ("OffloadingConnector", {"lora_pool": "1GiB"})), 0),
        (inside(("OffloadingConnector", {"lora_pool": "1GiB"})), 0),
        (engine("MultiConnector", {}), 0),
        (engine("MultiConnector", None), 0),
        # Somebody else's, whatever it is set to; and engines without any.
        (engine("OffloadingConnector", {"lora_pool": "1GiB", "unknown to us": 1}), 0),
        (engine("OffloadingConnector", {"connectors": [{"kv_connector": OURS}]}), 0),
        (engine(None, None), 0),
        (SimpleNamespace(kv_transfer_config=None), 0),
        (None, 0),
    ],
)
def test_the_pool_is_as_large_as_our_part_of_the_configuration_says(config: Any, size: int) -> None:
    assert pool_bytes(config) == size


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"lora_pool": "much"}, ["lora_pool", "'much'", "4GiB"]),
        ({"lora_pool": "-1GiB"}, ["lora_pool", "'-1GiB'"]),
        ({"lora_pool": 4 << 30}, ["lora_pool=4294967296", "must be a str"]),
        ({"lora_pool": "0"}, ["lora_pool is 0", "leave it out"]),
        ({"lora_pols": "1GiB"}, ["'lora_pols'", "did you mean 'lora_pool'"]),
    ],
)
def test_a_wrong_size_is_named_with_its_fix_before_anything_starts(extra: dict[str, Any], words: list[str]) -> None:
    for config in (engine(OURS, extra), inside(("OffloadingConnector", {}), (OURS, extra))):
        with pytest.raises(ConfigError) as caught:
            pool_bytes(config)
        for word in words:
            assert word in str(caught.value)


def test_a_pool_goes_with_a_daemon_that_runs_already() -> None:
    """It is the engine's memory, not the daemon's."""
    options = own_options(engine(OURS, {"server": "unix:///s", "lora_pool": "1GiB"}))
    assert options == Options(server="unix:///s", lora_pool="1GiB")


def test_an_engine_with_another_s_connector_has_our_defaults() -> None:
    assert own_options(engine("OffloadingConnector", {"server": "unix:///s"})) == Options()
