# SPDX-License-Identifier: Apache-2.0
"""What operators ask for: selections of objects, lookup, listing, jobs, transfers between tiers, adapters, audit.

May import: adapters, cache, cache.policy, cache.state, cache.tier, errors, folder, groups, keys, logs, namespaces,
    results, storage_backends, tiers, wire
Threads: the daemon's loop; jobs are coroutines (steps.py), and clients are answered between their steps. Adapter files
are read on threads of adapters.py.
"""
