# SPDX-License-Identifier: Apache-2.0
"""What the cache knows: the arena and its extents, the dependency tree, leases, pins, counters, events.

May import: errors, free_pages, mapping, memory_limit, storage_backends, tiers
Threads: the daemon's loop alone reads and writes it. Bytes of extents are written by whoever holds their lease.
"""
