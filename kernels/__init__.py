# SPDX-License-Identifier: Apache-2.0
"""Kernels: copies of pages between engine memory and the arena (page_copy), and SGMV over paged LoRA weights.

May import: nothing of ours
Threads: the caller's, on the caller's stream.
"""
