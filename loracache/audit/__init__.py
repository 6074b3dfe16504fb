# SPDX-License-Identifier: Apache-2.0
"""Whether what is kept fits together: the disk tier's files, manifest, namespaces and names, and a Redis.

May import: adapters, config, errors, keys, storage_backends, storage_backends.disk, storage_backends.redis
Threads: one, of `loracache check`, which holds the folder's lock; a Redis may be in use meanwhile.
"""
