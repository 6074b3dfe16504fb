# SPDX-License-Identifier: Apache-2.0
"""Patterns of module names: regular expressions out of a file that anybody wrote, matched without going back.

Python's `re` tries one way after another, for ever where a file wants it to. Here a match is a set of positions in the
name, kept as the bits of a number, and every part of the pattern turns the set it begins at into the set it ends at
(Thompson, 1968): nothing is tried twice, and `steps` says beforehand how much work there is. What no such set can
express (references to groups, looking behind, possessive repeats) is refused. Pure; safe from any thread.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import Protocol

__all__ = ["MOST_PATTERNS", "Pattern", "compiled"]

MOST_PATTERNS = 4096
"""Of one configuration: there may be one for every module."""

_MOST_CHARACTERS = 512
_PLAIN = re.compile(r"(?:\w|[.^$-]|\\[.-])*", re.ASCII)
_PLAIN_STEPS = 2  # what `re` takes for a plain pattern, in steps of ours
_ESCAPES = "dDwWsSntrfv"
_BETWEEN = "bBAZ"  # between characters, as ^ and $ are
_REPEAT = re.compile(r"\*|\+|\?|\{([0-9]+)\}|\{([0-9]*),([0-9]*)\}")
_SET = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_OBSCURE_SET = re.compile(r"\[\^?\[|--|\|\||&&|~~")  # that a later Python may read as something else
_NAMED = re.compile(r"\?P<\w+>")


class Pattern:
    """A pattern as PEFT reads one: it matches a name whose end, from the beginning or from a dot on, is all of it.
    Raises ValueError with the reason where it cannot be used."""

    def __init__(self, text: str) -> None:
        if len(text) > _MOST_CHARACTERS:
            raise ValueError(f"has more than {_MOST_CHARACTERS} characters")
        if any(_OBSCURE_SET.search(each[0]) for each in _SET.finditer(re.sub(r"\\.", "__", text))):
            raise ValueError("has a set that may be read in two ways; put a backslash before its special letters")
        try:
            re.compile(text)
            whole = re.compile(rf"(.*\.)?({text})$")
            self._plain = whole if _PLAIN.fullmatch(text) else None
            self._node: _Node = _Sequence(()) if self._plain else _Parser(text).whole()
        except (re.error, OverflowError) as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        except RecursionError:
            raise ValueError("is nested too deeply") from None

    def steps(self, length: int) -> int:
        """At most so many steps, of up to a microsecond each, for a name of this length."""
        return _PLAIN_STEPS if self._plain else self._node.steps(length)

    def matches(self, name: str) -> bool:
        """Whether it is the pattern of this module."""
        if self._plain:
            return self._plain.match(name) is not None
        line = name.partition("\n")[0]
        starts = 1 + sum(1 << at for at, letter in enumerate(line, 1) if letter == ".")
        ends = 1 << len(name) | (1 << len(name) - 1 if name.endswith("\n") else 0)
        return bool(self._node.after(_text(name), starts) & ends)


@functools.lru_cache(maxsize=2 * MOST_PATTERNS)
def compiled(text: str) -> Pattern:
    """`Pattern`, remembered."""
    return Pattern(text)


class _Text:
    """A name. where: the positions of each of its letters."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.where: dict[str, int] = {}
        for at, letter in enumerate(name):
            self.where[letter] = self.where.get(letter, 0) | 1 << at


_text = functools.lru_cache(maxsize=64)(_Text)  # all patterns are asked for one name, then for the next


class _Node(Protocol):
    """A part of a pattern. Positions are bits: bit n stands before the letter n."""

    def after(self, text: _Text, starts: int) -> int:
        """Where it may end that begins at one of these positions."""

    def steps(self, length: int) -> int:
        """At most so many steps of `after`."""


@dataclass(frozen=True)
class _Letter:
    """One letter of a kind. known: which letters are."""

    kind: re.Pattern[str]
    known: dict[str, bool] = field(default_factory=dict)

    def after(self, text: _Text, starts: int) -> int:
        mask = 0
        for letter, places in text.where.items():
            if letter not in self.known:
                self.known[letter] = self.kind.fullmatch(letter) is not None
            if self.known[letter]:
                mask |= places
        return (starts & mask) << 1

    def steps(self, length: int) -> int:
        return 1


@dataclass(frozen=True)
class _Between:
    """A place between letters: an end of the name or of a word."""

    kind: re.Pattern[str]

    def after(self, text: _Text, starts: int) -> int:
        return sum(1 << at for at in _bits(starts) if self.kind.match(text.name, at))

    def steps(self, length: int) -> int:
        return length + 1


@dataclass(frozen=True)
class _Sequence:
    """One behind another."""

    parts: tuple[_Node, ...]

    def after(self, text: _Text, starts: int) -> int:
        for part in self.parts:
            starts = part.after(text, starts)
        return starts

    def steps(self, length: int) -> int:
        return 1 + sum(part.steps(length) for part in self.parts)


@dataclass(frozen=True)
class _Choice:
    """One of these."""

    parts: tuple[_Node, ...]

    def after(self, text: _Text, starts: int) -> int:
        found = 0
        for part in self.parts:
            found |= part.after(text, starts)
        return found

    def steps(self, length: int) -> int:
        return 1 + sum(part.steps(length) for part in self.parts)


@dataclass(frozen=True)
class _Repeat:
    """At least and at most so often; most is None where there is no bound."""

    part: _Node
    least: int
    most: int | None

    def after(self, text: _Text, starts: int) -> int:
        for _ in range(self.least):
            starts = self.part.after(text, starts)
        found, left = starts, None if self.most is None else self.most - self.least
        while starts and left != 0:  # what was reached before, by fewer repeats, leads nowhere new
            starts = self.part.after(text, starts) & ~found
            found |= starts
            left = left if left is None else left - 1
        return found

    def steps(self, length: int) -> int:
        free = length + 2 if self.most is None else min(self.most - self.least, length + 2)
        return 1 + (self.least + free) * self.part.steps(length)


@dataclass(frozen=True)
class _Ahead:
    """What follows is so, or is not."""

    part: _Node
    wanted: bool

    def after(self, text: _Text, starts: int) -> int:
        return sum(1 << at for at in _bits(starts) if bool(self.part.after(text, 1 << at)) is self.wanted)

    def steps(self, length: int) -> int:
        return (length + 1) * self.part.steps(length)


class _Parser:
    """Reads what `re` has accepted."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def whole(self) -> _Node:
        return self._choice()

    def _choice(self) -> _Node:
        parts = [self._sequence()]
        while self._take("|"):
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else _Choice(tuple(parts))

    def _sequence(self) -> _Node:
        parts: list[_Node] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            parts.append(self._repeated(self._part()))
        return _Sequence(tuple(parts))

    def _repeated(self, part: _Node) -> _Node:
        match = _REPEAT.match(self._text, self._at)
        if match is None:
            return part
        self._at = match.end()
        self._take("?")  # the same names match, whatever is tried first
        if self._take("+"):
            raise ValueError("has a possessive repeat; take the + behind it away")
        exactly, least, most = match.groups()
        if exactly is not None:
            return _Repeat(part, int(exactly), int(exactly))
        if least is not None:
            return _Repeat(part, int(least or 0), int(most) if most else None)
        return _Repeat(part, 1 if match[0] == "+" else 0, 1 if match[0] == "?" else None)

    def _part(self) -> _Node:
        letter = self._text[self._at]
        if letter == "(":
            return self._group()
        if letter == "[":
            match = _SET.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            return _Letter(re.compile(match[0]))
        self._at += 1
        if letter == "\\":
            return self._escaped()
        if letter in "^$":
            return _Between(re.compile(letter))
        return _Letter(re.compile(letter if letter == "." else re.escape(letter)))

    def _escaped(self) -> _Node:
        letter = self._text[self._at]
        self._at += 1
        if letter in _BETWEEN:
            return _Between(re.compile("\\" + letter))
        if letter.isalnum() and letter not in _ESCAPES:
            raise ValueError(f"has \\{letter}, which is not supported; write out what it stands for")
        return _Letter(re.compile("\\" + letter))

    def _group(self) -> _Node:
        self._at += 1
        ahead: bool | None = None
        if self._take("?=") or self._take("?!"):
            ahead = self._text[self._at - 1] == "="
        elif match := _NAMED.match(self._text, self._at):
            self._at = match.end()
        elif not self._take("?:") and self._take("?"):
            raise ValueError("has a group of a kind that is not supported; of those with (? use (?: (?= and (?!")
        inside = self._choice()
        self._at += 1  # the bracket that closes it
        return inside if ahead is None else _Ahead(inside, ahead)

    def _take(self, what: str) -> bool:
        taken = self._text.startswith(what, self._at)
        self._at += len(what) if taken else 0
        return taken


def _bits(positions: int) -> list[int]:
    found = []
    while positions:
        lowest = positions & -positions
        found.append(lowest.bit_length() - 1)
        positions ^= lowest
    return found
