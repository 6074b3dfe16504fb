"""What operators ask for: selections of objects, lookup, listing, jobs, transfers between tiers, adapters, audit.

May import: adapters, cache, cache.state, cache.tier, errors, keys, namespaces, results, storage_backends, tiers, wire
Threads: the daemon's loop; jobs run in steps, so that clients are answered between them. Adapter files are read on
threads of adapters.py.
"""
