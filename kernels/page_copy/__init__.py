# SPDX-License-Identifier: Apache-2.0
"""Copies of blocks between an engine's KV cache and host buffers: many moves in one submission.

May import: nothing of ours
Threads: one copier a thread; a Copy may be asked and waited for on any.
"""

from loracache.kernels.page_copy.copier import PageCopier
from loracache.kernels.page_copy.moves import Copy, CopyError, Move

__all__ = ["Copy", "CopyError", "Move", "PageCopier"]
