# SPDX-License-Identifier: Apache-2.0
"""Connections to the daemon that outlive it: the scheduler's, which is never waited for, and the workers'.

May import: client, errors, mapping, tiers
Threads: each belongs to the thread that uses it; pinned.py registers a new mapping with the GPU on a thread of its own.
"""
