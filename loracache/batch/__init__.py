# SPDX-License-Identifier: Apache-2.0
"""Offline batches: a plan in which what requests share is computed once, and what sends them so to engines.

May import: backoff, client, errors, keys
Threads: the caller's. The plan (prompts, tree, fold, holding, replay, plan) and its shares are pure: numpy, no daemon
and no engine.
"""
