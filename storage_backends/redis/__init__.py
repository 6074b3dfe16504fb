# SPDX-License-Identifier: Apache-2.0
"""Objects in a Redis: one server, a cluster, or what sentinels name.

May import: adapters, backoff, errors, storage_backends
Threads: any number; each call has a connection of its own.
"""
