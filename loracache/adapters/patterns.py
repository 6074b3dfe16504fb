# SPDX-License-Identifier: Apache-2.0
"""Patterns of module names: regular expressions out of a file that anybody wrote.

Python's `re` tries one way after another, for ever where a file wants it to. RE2 does not go back: what it takes grows
with the pattern and with the name, and is known beforehand. A pattern must mean the same to both: what only one of them
accepts, or what they read differently, is refused. Pure; safe from any thread.
"""

from __future__ import annotations

import functools
import re

import re2

__all__ = ["MOST_PATTERNS", "Pattern", "compiled"]

MOST_PATTERNS = 4096
"""Of one configuration: there may be one for every module."""

_MOST_CHARACTERS = 512
_MOST_MEMORY = 256 << 10  # bytes, of one compiled pattern
_PLAIN = re.compile(r"(?:\w|[.^$-]|\\[.-])*", re.ASCII)  # nothing is repeated: `re` is as quick, and knows every letter
_SET = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_OBSCURE_SET = re.compile(r"\[\^?\[|\[:|--|\|\||&&|~~")
_OBSCURE = {r"\\[0-9]": "a backslash before a digit", r"\{,": "{, (write {0,)"}


class Pattern:
    """A pattern as PEFT reads one: it matches a name whose end, from the beginning or from a dot on, is all of it.
    Raises ValueError with the reason where it cannot be used."""

    def __init__(self, text: str) -> None:
        if len(text) > _MOST_CHARACTERS:
            raise ValueError(f"has more than {_MOST_CHARACTERS} characters")
        if any(_OBSCURE_SET.search(each[0]) for each in _SET.finditer(re.sub(r"\\.", "__", text))):
            raise ValueError("has a set that may be read in two ways; put a backslash before its special letters")
        whole = rf"(.*\.)?({text})$"
        try:
            re.compile(text)
            self._plain = re.compile(whole)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        self._linear = None if _PLAIN.fullmatch(text) else _linear(text, whole)

    def steps(self, length: int) -> int:
        """At most so many steps, of some nanoseconds each, for a name of this length."""
        return (length + 1) * (1 if self._linear is None else self._linear.programsize)

    def matches(self, name: str) -> bool:
        """Whether it is the pattern of this module."""
        return (self._plain if self._linear is None else self._linear).match(name) is not None


def _linear(text: str, whole: str) -> re2._Regexp:
    if not text.isascii():
        raise ValueError("has letters beyond ASCII, where the two kinds of patterns differ; use `.` for them")
    for obscure, what in _OBSCURE.items():
        if re.search(obscure, text):
            raise ValueError(f"has {what}, which may be read in two ways")
    options = re2.Options()
    options.max_mem, options.log_errors = _MOST_MEMORY, False
    try:
        return re2.compile(whole, options)
    except re2.error as error:
        raise ValueError(f"is not for RE2, which matches it: {_reason(error)}") from None


def _reason(error: re2.error) -> str:
    reason = error.args[0] if error.args else ""
    return reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)


@functools.lru_cache(maxsize=2 * MOST_PATTERNS)
def compiled(text: str) -> Pattern:
    """`Pattern`, remembered."""
    return Pattern(text)
