"""The vLLM connector: KV of stock vLLM, found again in LoRACache. docs/vllm.md says what it promises.

What vLLM loads:
    connector.py    hands every call to one of the two sides
    options.py      kv_connector_extra_config
    messages.py     what one side tells the other

The scheduler's side, in EngineCore:
    scheduler.py    looks up, plans loads and stores, keeps leases
    requests.py     what it remembers of one request
    namespace.py    in which namespace a request's KV is
    media.py        what the images and the like in a prompt are
    blocks.py       what vLLM's own blocks are keyed by, where a request has an adapter
    resets.py       what changed weights and vLLM's resets mean for plans and for blocks that are held
    link.py         its connection, which is never waited for
    identity.py     which model this is, from its configuration (effective.py, not_counted.py) and weight_files.py
    hit_sources.py  our tiers in vLLM's hit metrics

The workers' side:
    worker.py       carries plans out, reports what came of them
    transfer.py     the threads that load and store
    weights.py      notices that weights were replaced in place; fingerprint.py samples them
    gate.py         keeps copies away from blocks while vLLM sleeps
    layout.py       how the registered tensors lie in memory
    pinned.py       makes the mapped arena fast to copy from and to
    cores.py        where our threads run beside a CPU worker

Both:
    adapters.py     which adapter content a lora_int_id stands for
    geometry.py     shards, chunk sizes, what can be cached at all
    private.py      the daemon of an engine that names none
    reports.py      carries what workers tell, heard once each
    connectors_of.py  a scheduler's connectors, for patches of vLLM
    releases.py     which releases of vLLM we know
    outage.py       says once that the daemon is gone, and once that it is back
    worker_link.py  a worker thread's connection
    lora/           adapters on pages
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loracache.connectors.vllm.connector import LoRACacheConnector

__all__ = ["LoRACacheConnector"]


def __getattr__(name: str) -> Any:
    """Imports the connector when vLLM asks for it: the plugin is loaded in every process, and most need no more."""
    if name != "LoRACacheConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from loracache.connectors.vllm.connector import LoRACacheConnector

    return LoRACacheConnector
