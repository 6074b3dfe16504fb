# SPDX-License-Identifier: Apache-2.0
"""Which way small fragments go."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loracache.kernels.page_copy.device import Direction
from loracache.kernels.page_copy.fragments import Fragments

__all__ = ["FEW", "Choice"]

FEW = 16  # fragments below which nothing is gained by handing them over together


@dataclass(frozen=True, slots=True)
class Choice:
    """Moves whose fragments have fewer bytes than this on average go through slots and a kernel, others straight. On
    average, because what counts is how many there are to a byte."""

    loads: int
    stores: int

    def bounces(self, direction: Direction, fragments: Fragments) -> bool:
        """Whether these do. The kernels move 16 bytes at a time."""
        below = self.loads if direction is Direction.LOAD else self.stores
        if len(fragments) < FEW or fragments.mean >= below:
            return False
        both = np.bitwise_or.reduce(fragments.device) | np.bitwise_or.reduce(fragments.nbytes)
        return not int(both) & 15
