"""REST and metrics: a process of its own, a client of the daemon's socket like any other, so that no HTTP request can
hold the cache's loop up.
"""
