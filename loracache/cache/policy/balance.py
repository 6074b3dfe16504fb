# SPDX-License-Identifier: Apache-2.0
"""How much of a tier adapters may take beside KV: as much as makes the next byte worth the same to both.

Names of the last victims of each kind are kept. Who asks for one of them says what its kind lacks room for, and what
that cost: the seconds to have it again, by the bytes that would have had to be larger for it to be there. Each such
miss moves room to its kind, until both lose the same for want of a byte (Cidon et al., "Cliffhanger", NSDI 2016, with
seconds in the place of hits).
"""

from __future__ import annotations

from collections import OrderedDict

__all__ = ["Balance"]

_REACH = 1 / 8  # of the tier, in victims of each kind whose names are kept
_MOST = 1 << 16  # names of each kind
_STEP = 1.0  # bytes that a miss moves, by what could be computed in the time that it cost
_FARTHEST = 1 / 32  # of the tier, by one miss


class _Ghosts:
    """Victims of one kind, the last ones."""

    def __init__(self) -> None:
        self._sizes: OrderedDict[int, int] = OrderedDict()
        self.nbytes = 0

    def add(self, name: int, nbytes: int, limit: float) -> None:
        self.nbytes += nbytes - self._sizes.pop(name, 0)
        self._sizes[name] = nbytes
        while len(self._sizes) > 1 and (self.nbytes > limit or len(self._sizes) > _MOST):
            self.nbytes -= self._sizes.popitem(last=False)[1]

    def take(self, name: int) -> int:
        """Its bytes, 0 where it is not among them."""
        nbytes = self._sizes.pop(name, 0)
        self.nbytes -= nbytes
        return nbytes


class Balance:
    """`adapters` is the bytes that they may take; None: nothing had to go so far."""

    def __init__(self) -> None:
        self._ghosts = (_Ghosts(), _Ghosts())  # of KV, of adapters
        self.adapters: float | None = None

    def left(self, name: int, lora: bool, nbytes: int, tier_bytes: int) -> None:
        """A victim has left a tier that holds so many bytes."""
        self._ghosts[lora].add(name, nbytes, _REACH * tier_bytes)

    def came(self, name: int, lora: bool, worth: float, taken: int, tier_bytes: int) -> None:
        """An object came into the tier. worth: the bytes of KV that could be computed while it is brought back. taken:
        by adapters, now."""
        ghosts = self._ghosts[lora]
        reach = ghosts.nbytes
        if not ghosts.take(name) or self.adapters is None:
            return
        lack = worth * max(self._ghosts[0].nbytes, self._ghosts[1].nbytes, reach) / reach
        step = min(_STEP * lack, _FARTHEST * tier_bytes)
        self.adapters += step if lora else -step
        self.adapters = min(max(self.adapters, 0.0), taken + _FARTHEST * tier_bytes)
