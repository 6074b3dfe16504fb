# SPDX-License-Identifier: Apache-2.0
"""What all of an engine's processes use: options, messages between the sides, the private daemon, patches of vLLM.

May import: backoff, client, config, connectors.vllm.lora, errors, groups, keys, logs
Threads: values and functions; nothing here starts a thread.
"""
