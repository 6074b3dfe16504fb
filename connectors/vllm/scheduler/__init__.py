# SPDX-License-Identifier: Apache-2.0
"""The scheduler's side, in EngineCore: looks up, plans loads and stores, keeps leases.

May import: backoff, connectors.vllm.common, connectors.vllm.link, connectors.vllm.lora,
    connectors.vllm.scheduler.lora, groups, keys, transfer_times
Threads: the engine's loop alone. It never waits for the daemon.
"""
