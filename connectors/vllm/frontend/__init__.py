# SPDX-License-Identifier: Apache-2.0
"""The API server's part: model=NAME for adapters that only the cache knows, load_inplace carried out once, and reasons.

May import: adapters, backoff, client, connectors.vllm.common, connectors.vllm.lora, errors
Threads: the front end's event loop; questions have a thread of their own.
"""
