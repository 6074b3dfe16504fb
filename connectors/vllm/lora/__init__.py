# SPDX-License-Identifier: Apache-2.0
"""What both sides know of paged adapters: where matrices stand in pages, and what modules and adapters are called.

May import: adapters, errors, kernels
Threads: values and pure functions.
"""
