# SPDX-License-Identifier: Apache-2.0
"""What an engine's log tells the end-to-end tests."""

from __future__ import annotations

__all__ = ["weights_are_known"]


def weights_are_known(log: str) -> bool:
    """Whether an engine that answers has read its model's weights. It does so in the background, at the lowest
    priority: on two busy cores that takes seconds, and what is asked before it is done is not cached."""
    begun = log.count("reading the model's weights")
    return begun <= log.count("read the model's weights") + log.count("cannot be told from other models")
