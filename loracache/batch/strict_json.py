# SPDX-License-Identifier: Apache-2.0
"""JSON as its standard has it. Python reads NaN and Infinity, and numbers too large for a float as infinite; written
again, they are what no other program reads.
"""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["parse"]


def parse(text: str) -> Any:
    """What `text` says. Raises ValueError where it is no JSON, or a number is none; RecursionError where it nests too
    deeply for Python."""
    return json.loads(text, parse_constant=_refused, parse_float=_finite)


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value
