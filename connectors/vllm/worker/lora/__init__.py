# SPDX-License-Identifier: Apache-2.0
"""Adapters on pages of the engine's memory: the pool, the thread that fills it, and vLLM's LoRA layers upon it.

May import: adapters, client, connectors.vllm.common, connectors.vllm.link, connectors.vllm.lora, errors,
    free_pages, kernels, keys, results
Threads: tables are written by the worker's main thread; pages are filled by the activation thread.
"""
