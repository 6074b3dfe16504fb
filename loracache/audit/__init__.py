# SPDX-License-Identifier: Apache-2.0
"""Whether what is kept fits together: the disk tier's files, manifest, namespaces and names, a Redis, a daemon's index.

May import: adapters, client, config, errors, keys, storage_backends, storage_backends.disk, storage_backends.redis
Threads: one, of `loracache check`, which holds the folder's lock or asks the daemon that does; all may be in use.
"""
