# SPDX-License-Identifier: Apache-2.0
"""Storage backends: tiers below the arena. base.py holds the interface and its contract, memory.py the reference.

May import: errors
Threads: a backend's methods block, and are called on the cache's threads for it.
"""
