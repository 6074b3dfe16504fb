# SPDX-License-Identifier: Apache-2.0
"""REST, metrics and the dashboard: a process of its own, a client of the daemon's socket like any other, so that no
HTTP request can hold the cache's loop up.

May import: accepting, adapters, client, config, errors, groups, keys, logs, results, tiers, tracing, wire
Threads: an event loop; one connection to the daemon, shared.
"""
