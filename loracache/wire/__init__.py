# SPDX-License-Identifier: Apache-2.0
"""What the unix socket carries: frames, the fields of messages, and every message with its limits.

May import: errors, keys
Threads: values only; nothing here waits or holds a lock.
"""
