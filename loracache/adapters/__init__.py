# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters as bytes: PEFT folders, the payload that is cached of one and its digest, names that point to digests.

May import: errors, folder, keys
Threads: pure functions but for names.py, whose books belong to the daemon's loop and to one thread that writes them.
"""
