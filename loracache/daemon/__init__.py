# SPDX-License-Identifier: Apache-2.0
"""The daemon: one process, one event loop that owns the cache, a unix socket, and the REST process beside it.

May import: accepting, adapters, cache, cache.state, cache.swap, config, control, errors, folder, keys, namespaces,
    rest, results, storage_backends, storage_backends.disk, storage_backends.redis, tiers, tracing, wire
Threads: the loop; at start one thread touches the arena's pages and one scans the disk tier.
"""
