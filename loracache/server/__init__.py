"""The daemon: one process, one event loop that owns the cache, a unix socket.

`daemon` builds and runs it, `session` serves one connection, `peers` knows when a client's process is gone, `status`
says how things stand. REST and metrics will run in a process of their own, as a client of the socket.
"""
