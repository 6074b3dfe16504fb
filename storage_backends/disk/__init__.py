# SPDX-License-Identifier: Apache-2.0
"""Objects as files in a folder, with an append-only manifest beside them.

May import: errors, folder, storage_backends
Threads: any number; files are immutable, and the manifest has a lock.
"""
