# SPDX-License-Identifier: Apache-2.0
"""The workers' side: carries the scheduler's plans out and reports what came of them.

May import: adapters, backoff, client, connectors.vllm.common, connectors.vllm.link, connectors.vllm.worker.lora,
    errors, groups, kernels.page_copy, keys, results
Threads: the worker's main thread, one that loads and one that stores.
"""
