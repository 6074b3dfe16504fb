# SPDX-License-Identifier: Apache-2.0
"""TieredCache: where objects are, who holds them, and what leaves which tier. One data path for KV and LoRA.

May import: cache.policy, cache.state, cache.tier, results, storage_backends, tiers
Threads: the daemon's loop alone. Nothing here waits for a device; cache.tier has the threads that do.
"""
