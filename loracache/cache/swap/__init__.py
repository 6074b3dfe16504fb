# SPDX-License-Identifier: Apache-2.0
"""The swapper: what is brought into a tier ahead of need, and room made ahead of need. Of no policy.

May import: backoff, cache.policy, cache.state, results, storage_backends, tiers
Threads: the cache's alone, in steps that are short. Who moves the bytes is told by the caller.
"""
