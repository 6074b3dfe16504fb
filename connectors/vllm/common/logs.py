# SPDX-License-Identifier: Apache-2.0
"""Where our lines go in an engine's processes: where vLLM's own go, of one kind a few a minute."""

from __future__ import annotations

import logging

from loracache.logs import LimitedHandler

__all__ = ["log_as_vllm_does"]


def log_as_vllm_does() -> None:
    """vLLM gives handlers to loggers of its own name only; without one, Python shows nothing below a warning."""
    ours, theirs = logging.getLogger("loracache"), logging.getLogger("vllm")
    if not ours.hasHandlers():
        ours.setLevel(theirs.level)
        for handler in theirs.handlers:
            ours.addHandler(LimitedHandler(handler))
