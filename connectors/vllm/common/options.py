# SPDX-License-Identifier: Apache-2.0
"""`kv_connector_extra_config`: the settings of the connector, checked once."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any

from loracache.client.connection import socket_path
from loracache.config import ENVIRONMENT, holds_password, http_address, parse_size
from loracache.errors import ConfigError

__all__ = ["KV_LAYOUTS", "Options", "is_alone", "is_ours", "own_options", "pool_bytes"]

KV_LAYOUTS = ("BLNHC", "BLHNC")
"""vLLM's names (0.29 or later) of layouts whose outermost dimension are the blocks: tokens before KV heads, as most
attention reads it, or behind them."""

_CONNECTOR = "LoRACacheConnector"
_DAEMON_KEYS = ("memory", "disk_path", "disk", "redis", "redis_password_file", "http")


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of one engine's connector.

    server: the daemon's socket, "unix:///path"; without it the engine starts a private daemon that takes memory (a
    size), disk_path, disk (a size), redis (a URL without a password: process lists and vLLM's log show what stands
    here), redis_password_file and http (HOST:PORT of its REST) from here. model_id: names the model's weights where
    they are not to be read. chunk_tokens: tokens of a chunk, a multiple of the engine's block size; 0 chooses.
    bounce_below: a size; runs of KV that are smaller on average go through memory of the GPU and a kernel, others
    straight; without it as is best for the GPU, by measurement.
    load_timeout: seconds without a byte after which a load is given up and recomputed. recompute_if_faster: what is
    found is computed where that is predicted to be so many times faster than loading it; 0: never. lookup_wait: seconds
    for which any request may be parked for the answer to its lookup, lookup_wait_most: for which one may be that has
    much to gain. kv_layout: how KV should lie in the engine's memory, one of KV_LAYOUTS; without it vLLM chooses.
    layer_by_layer: KV that is in memory and long in coming is loaded within the step that computes upon it, layer by
    layer. lora_pool: engine memory for LoRA adapters as pages, a size; without it they are vLLM's own matter.
    lora_prefetch: how many of those that all engines' requests ask for most are brought onto free pages of it ahead of
    a request; 0: none.
    """

    server: str = ""
    memory: str = "4GiB"
    disk_path: str = ""
    disk: str = "20GiB"
    redis: str = ""
    redis_password_file: str = ""
    http: str = ""
    model_id: str = ""
    chunk_tokens: int = 0
    bounce_below: str = ""
    load_timeout: float = 10.0
    recompute_if_faster: float = 1.5
    lookup_wait: float = 0.02
    lookup_wait_most: float = 1.0
    kv_layout: str = ""
    layer_by_layer: bool = False
    lora_pool: str = ""
    lora_prefetch: int = 0

    @property
    def bounce_bytes(self) -> int | None:
        """`bounce_below` in bytes; None: as measured."""
        return parse_size(self.bounce_below) if self.bounce_below else None

    @classmethod
    def parse(cls, extra: dict[str, Any]) -> Options:
        """Raises ConfigError naming key, value and fix."""
        known = {field.name: field for field in fields(cls)}
        for key, value in extra.items():
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ConfigError(f"kv_connector_extra_config: unknown key {key!r}{hint}; known: {', '.join(known)}")
            if holds_password(value):
                raise ConfigError(
                    f"kv_connector_extra_config: {key} has a password in it, and this configuration stands in process "
                    f"lists and in vLLM's log: change that password; give redis by {ENVIRONMENT}REDIS in the engine's "
                    "environment, or the password alone by redis_password_file"
                )
            default = known[key].default
            kinds = (int, float) if isinstance(default, float) else (type(default),)
            if isinstance(value, bool) is not isinstance(default, bool) or not isinstance(value, kinds):
                shown = "(secret)" if key == "redis" else repr(value)
                raise ConfigError(f"kv_connector_extra_config: {key}={shown} must be a {type(default).__name__}")
        options = cls(**extra)
        options._check(extra)
        return options

    def _check(self, extra: dict[str, Any]) -> None:
        if self.server:
            socket_path(self.server)
            both = [key for key in _DAEMON_KEYS if key in extra]
            if both:
                raise ConfigError(
                    f"kv_connector_extra_config: {both[0]}={extra[both[0]]!r} belongs to the daemon at "
                    f"server={self.server!r}; give it to `loracache serve`, or leave server out to start a "
                    f"private daemon"
                )
        for key in ("memory", "disk", *(key for key in ("lora_pool", "bounce_below") if getattr(self, key))):
            try:
                size = parse_size(getattr(self, key))
            except ValueError as error:
                raise ConfigError(f"kv_connector_extra_config: {key}: {error}") from None
            if key == "lora_pool" and not size:
                raise ConfigError("kv_connector_extra_config: lora_pool is 0; leave it out to have no pool")
        if self.http:
            try:
                http_address(self.http)
            except ValueError as error:
                raise ConfigError(f"kv_connector_extra_config: http: {error}") from None
        for key in ("chunk_tokens", "lora_prefetch"):
            if getattr(self, key) < 0:
                raise ConfigError(f"kv_connector_extra_config: {key}={getattr(self, key)} is negative")
        for key in ("lookup_wait", "lookup_wait_most"):
            if not 0 <= getattr(self, key) <= 10:
                raise ConfigError(
                    f"kv_connector_extra_config: {key}={getattr(self, key)} must be within 0 and 10 seconds"
                )
        if self.kv_layout and self.kv_layout not in KV_LAYOUTS:
            raise ConfigError(
                f"kv_connector_extra_config: kv_layout={self.kv_layout!r} must be one of {', '.join(KV_LAYOUTS)}; for "
                "another one set VLLM_KV_CACHE_LAYOUT, or leave kv_layout out for vLLM's own"
            )
        if self.recompute_if_faster and not 1 <= self.recompute_if_faster <= 1000:
            raise ConfigError(
                f"kv_connector_extra_config: recompute_if_faster={self.recompute_if_faster} must be within 1 and 1000, "
                f"or 0 to load whatever is found"
            )
        if not 0 < self.load_timeout <= 600:
            raise ConfigError(
                f"kv_connector_extra_config: load_timeout={self.load_timeout} must be within 0 and 600 seconds"
            )


def own_options(vllm_config: Any) -> Options:
    """The options of an engine's connector where that is ours, also inside a MultiConnector; else the defaults. Raises
    ConfigError."""
    transfer = getattr(vllm_config, "kv_transfer_config", None)
    return Options.parse(dict(_own_extra(transfer) or {})) if transfer is not None else Options()


def is_ours(vllm_config: Any) -> bool:
    """Whether an engine has our connector, alone or inside a MultiConnector."""
    transfer = getattr(vllm_config, "kv_transfer_config", None)
    return transfer is not None and _own_extra(transfer) is not None


def is_alone(vllm_config: Any) -> bool:
    """Whether an engine has our connector and no other."""
    return getattr(getattr(vllm_config, "kv_transfer_config", None), "kv_connector", None) == _CONNECTOR


def pool_bytes(vllm_config: Any) -> int:
    """Bytes of `lora_pool`, 0 where an engine has none. Raises ConfigError."""
    options = own_options(vllm_config)
    return parse_size(options.lora_pool) if options.lora_pool else 0


def _own_extra(transfer: Any) -> dict[str, Any] | None:
    """Our part of the configuration: the connector's own, or ours inside a MultiConnector's; None where neither is."""
    extra: dict[str, Any] = transfer.kv_connector_extra_config or {}
    if transfer.kv_connector == _CONNECTOR:
        return extra
    inner = extra.get("connectors", ()) if transfer.kv_connector == "MultiConnector" else ()
    found = [one.get("kv_connector_extra_config") or {} for one in inner if one.get("kv_connector") == _CONNECTOR]
    return found[0] if found else None
