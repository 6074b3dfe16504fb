# SPDX-License-Identifier: Apache-2.0
"""How a LoRARequest's path names an adapter that only the cache knows: "loracache:" and its digest.

The digest is the content: another content has another path, and with it other keys in vLLM's own prefix cache.
"""

from __future__ import annotations

import re

__all__ = ["digest_in", "path_of"]

_PATH = re.compile(r"loracache:([0-9a-f]{64})")


def path_of(digest: str) -> str:
    """The path of a digest (hex)."""
    return f"loracache:{digest}"


def digest_in(path: str) -> str | None:
    """The digest in a path, or None where it names a folder."""
    match = _PATH.fullmatch(path)
    return match[1] if match else None
