# SPDX-License-Identifier: Apache-2.0
"""The simulator: traces replayed against the cache's own index and policies on a clock of its own.

May import: cache.policy, cache.state, cache.swap, errors, results, storage_backends, tiers
Threads: the caller's. Nothing here moves bytes: an object is its size.
"""
