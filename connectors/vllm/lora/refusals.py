# SPDX-License-Identifier: Apache-2.0
"""Why an adapter is not served, on its way from where that is found out to whoever asked: vLLM carries errors of calls,
and reasons why requests stopped, between its processes as text and as nothing else."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Refusal"]

_NEVER, _NOT_NOW = "the LoRA adapter cannot be served: ", "the LoRA adapter is not to be had now: "
_BEHIND = "', please check the stack trace"  # what vLLM puts behind the words of a worker


@dataclass(frozen=True, slots=True)
class Refusal:
    """why: in words, for who asked. forever: it is the adapter's or the engine's, and asking again helps nobody."""

    why: str
    forever: bool

    def __str__(self) -> str:
        return f"{_NEVER if self.forever else _NOT_NOW}{self.why}"

    @classmethod
    def found_in(cls, text: object) -> Refusal | None:
        """The refusal whose text stands somewhere in `text`."""
        for beginning, forever in ((_NEVER, True), (_NOT_NOW, False)):
            if isinstance(text, str) and beginning in text:
                return cls(text.partition(beginning)[2].partition(_BEHIND)[0], forever)
        return None
