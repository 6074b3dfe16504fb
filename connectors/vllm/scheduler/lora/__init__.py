# SPDX-License-Identifier: Apache-2.0
"""Which adapter's pages are where, in which order they are given out, and when a request may run.

May import: adapters, backoff, connectors.vllm.common, connectors.vllm.link, connectors.vllm.lora, errors, results,
    s3_fifo
Threads: the engine's loop; a thread of folders.py reads adapter folders.
"""
