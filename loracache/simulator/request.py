# SPDX-License-Identifier: Apache-2.0
"""What a trace is made of: requests, and what engines stored between them where a daemon has recorded that."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BLOCK_TOKENS", "Kept", "Request"]

BLOCK_TOKENS = 512  # of one hash id, where the format does not say otherwise


@dataclass(frozen=True, slots=True)
class Kept:
    """What an engine stored: blocks of `nbytes` each, one behind the other, the first behind the block `below` (None:
    it begins a chain). Without blocks: an adapter that it loaded, of `nbytes`."""

    blocks: tuple[int, ...]
    below: int | None
    adapter: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Request:
    """time: seconds since the first one. blocks: an id for each block of the prompt. adapter: its number, -1: none.
    session: its number. returns: it comes with the hint that its session will ask again.

    block_tokens: of each block but the last. What a recorded trace says: tenant: a number, -1: none; block_bytes and
    adapter_bytes: of each block, and of the adapter, 0: not known; held: so many leading blocks were there, and what
    was stored of the others is among what was `kept` before a later request (None: the request stores all of them).
    """

    time: float
    tokens: int
    blocks: tuple[int, ...]
    adapter: int = -1
    session: int = -1
    returns: bool = False
    block_tokens: int = BLOCK_TOKENS
    tenant: int = -1
    block_bytes: int = 0
    adapter_bytes: int = 0
    held: int | None = None
    kept: tuple[Kept, ...] = ()

    def tokens_of(self, position: int) -> int:
        """Tokens of one block; the last one may have fewer than the others."""
        return max(1, min(self.block_tokens, self.tokens - position * self.block_tokens))

    def bytes_of(self, position: int, token_bytes: int) -> int:
        """Bytes of one block, where a token of a trace that does not say so has `token_bytes`."""
        return self.block_bytes or self.tokens_of(position) * token_bytes

    def sizes(self, begin: int, end: int, token_bytes: int) -> list[int]:
        """Bytes of each of the blocks from `begin` on, up to `end`."""
        full = max(begin, min(end, self.tokens // self.block_tokens))  # as far as the prompt fills them
        sizes = [self.block_bytes or self.block_tokens * token_bytes] * (full - begin)
        return sizes + [self.bytes_of(position, token_bytes) for position in range(full, end)]
