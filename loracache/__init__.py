"""LoRACache: one external cache for everything an LLM server reads again."""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["CacheClient", "Namespace", "__version__", "chunk_keys", "object_key"]


def __getattr__(name: str) -> object:
    """Load the client on first use: `import loracache` alone stays cheap."""
    if name == "CacheClient":
        from loracache.client.client import CacheClient

        return CacheClient
    if name in ("Namespace", "chunk_keys", "object_key"):
        from loracache import keys

        return getattr(keys, name)
    raise AttributeError(f"module 'loracache' has no attribute {name!r}")
