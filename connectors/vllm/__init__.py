"""The vLLM connector: KV of stock vLLM, found again in LoRACache.

connector.py   what vLLM loads; hands every call to one of the two sides
scheduler.py   in EngineCore: looks up, plans loads and stores, keeps leases
worker.py      in each worker: copies between the KV cache and the arena
messages.py    what one side tells the other
layout.py      how the registered tensors lie in memory
identity.py    which model this is
adapters.py    which adapter content a lora_int_id stands for
transfer.py    the threads that load and store
options.py     kv_connector_extra_config
private.py     the daemon of an engine that names none
"""

from loracache.connectors.vllm.connector import LoRACacheConnector

__all__ = ["LoRACacheConnector"]
