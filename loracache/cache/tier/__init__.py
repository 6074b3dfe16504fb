# SPDX-License-Identifier: Apache-2.0
"""The tiers below the arena: their threads, write-behind, promotion, the disk's budget.

May import: backoff, cache.policy, cache.state, errors, results, storage_backends, tiers, tracing,
    transfer_times
Threads: decisions on the daemon's loop; a backend is called on its tier's own threads, and results come back to it.
"""
