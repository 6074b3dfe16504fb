# SPDX-License-Identifier: Apache-2.0
"""Draws the house: rooms (folders of modules), the floors they stand on, the arrows between them, and circles.

    python scripts/rooms.py                     print rooms, floors, circles
    python scripts/rooms.py --table             the table that docs/architecture.md holds
    python scripts/rooms.py --svg FILE          the picture
    python scripts/rooms.py --root CHECKOUT     the same of another checkout

Everything is read from the source (ast), imports inside functions and under TYPE_CHECKING too. A room is a folder; the
modules beside loracache/__init__.py are the ground, each a room of its own. A floor is the longest way down.
"""

from __future__ import annotations

import argparse
import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOUSES = ("connectors", "storage_backends", "kernels")  # top-level folders, imported through symlinks in loracache/


@dataclass
class House:
    """The modules of one checkout and what imports what."""

    root: Path
    sources: dict[str, Path] = field(default_factory=dict)  # dotted name -> file, each file once

    @classmethod
    def read(cls, root: Path) -> House:
        """Every module of ours; the symlinks in loracache/ give names and are not followed."""
        sources = {}
        for top in ("loracache", *HOUSES):
            for path in sorted((root / top).rglob("*.py")):
                parts = path.relative_to(root).with_suffix("").parts
                if top == "loracache" and parts[1] in HOUSES:
                    continue
                name = ".".join(parts).removesuffix(".__init__")
                sources[name if top == "loracache" else f"loracache.{name}"] = path
        return cls(root, sources)

    def room(self, module: str) -> str:
        """The folder a module is in, without "loracache." ("cache.tier"); a ground module is a room of its own."""
        package = module if self.sources[module].name == "__init__.py" else module.rpartition(".")[0]
        return (module if package == "loracache" else package).removeprefix("loracache").removeprefix(".")

    def imports(self, module: str) -> Iterator[str]:
        """Dotted names that `module` imports anywhere."""
        for node in ast.walk(parse(self.sources[module])):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                origin = self._absolute(module, node)
                for alias in node.names:
                    name = f"{origin}.{alias.name}"
                    yield name if name in self.sources else origin

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = module.split(".") if self.sources[module].name == "__init__.py" else module.split(".")[:-1]
        return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])

    @functools.cached_property
    def arrows(self) -> dict[str, frozenset[str]]:
        """Module -> modules of ours that it imports."""
        return {each: frozenset(set(self.imports(each)) & self.sources.keys() - {each}) for each in self.sources}

    @functools.cached_property
    def rooms(self) -> dict[str, frozenset[str]]:
        """Room -> other rooms that its modules import."""
        found: dict[str, set[str]] = {self.room(module): set() for module in self.sources}
        for module, targets in self.arrows.items():
            found[self.room(module)] |= {self.room(target) for target in targets} - {self.room(module)}
        return {room: frozenset(targets) for room, targets in found.items()}

    def reach(self, module: str) -> set[str]:
        """Every module that `module` leads to."""
        return reach(self.arrows, module)


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def reach(arrows: dict[str, frozenset[str]], start: str) -> set[str]:
    """All that `start` leads to along arrows; itself only where it is in a circle."""
    found: set[str] = set()
    waiting = list(arrows[start])
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += arrows[current]
    return found


def circles(arrows: dict[str, frozenset[str]]) -> list[list[str]]:
    """Groups of rooms or modules that lead to each other."""
    reaches = {name: reach(arrows, name) for name in arrows}
    groups = {tuple(sorted(other for other in reaches[name] if name in reaches[other])) for name in arrows}
    return [list(group) for group in sorted(groups) if group]


def floors(arrows: dict[str, frozenset[str]]) -> dict[str, int]:
    """The longest way down from each; those of a circle stand on one floor."""
    group = {name: frozenset(circle) for circle in circles(arrows) for name in circle}

    @functools.cache
    def floor(names: frozenset[str]) -> int:
        below = {target for name in names for target in arrows[name]} - names
        return max((floor(group.get(each, frozenset({each}))) + 1 for each in below), default=0)

    return {name: floor(group.get(name, frozenset({name}))) for name in arrows}


def purpose(house: House, room: str) -> str:
    """The first sentence of the room's docstring."""
    text = ast.get_docstring(parse(house.sources[f"loracache.{room}" if room else "loracache"])) or ""
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".")


def ground(house: House) -> set[str]:
    return {room for room in house.rooms if room and house.sources[f"loracache.{room}"].name != "__init__.py"}


def table(house: House) -> str:
    """The rooms as Markdown: what each is for, and which others it imports."""
    base = ground(house) | {""}
    lines = ["| room | what it is for | imports |", "|---|---|---|"]
    for room in sorted(house.rooms.keys() - base):
        below = ", ".join(f"`{target.replace('.', '/')}`" for target in sorted(house.rooms[room] - base))
        lines.append(f"| `{room.replace('.', '/')}` | {purpose(house, room)} | {below} |")
    return "\n".join(lines) + "\n"


def report(house: House) -> str:
    level = floors(house.rooms)
    out = []
    for height in sorted(set(level.values()), reverse=True):
        out.append(
            f"floor {height}: {'  '.join(sorted(room or 'loracache' for room in level if level[room] == height))}"
        )
    inner, outer = circles(house.arrows), circles(house.rooms)
    out.append(
        f"{len(house.rooms)} rooms on {len(set(level.values()))} floors, {sum(map(len, house.rooms.values()))} arrows"
    )
    out.append(f"circles of rooms: {outer or 'none'}")
    out.append(f"circles of modules: {inner or 'none'}")
    return "\n".join(out)


def svg(house: House) -> str:
    """The rooms on their floors, with an arrow for every import between two of them; the ground is one bar."""
    base = ground(house) | {""}
    arrows = {room: targets - base for room, targets in house.rooms.items() if room not in base}
    level = floors(arrows)
    rows = [sorted(room for room in level if level[room] == height) for height in range(max(level.values()) + 1)]
    wide, high, gap = 168, 34, 46
    width = max(len(row) for row in rows) * (wide + 16) + 16
    height = (len(rows) + 1) * (high + gap)
    place = {}
    for number, row in enumerate(rows):
        left = (width - len(row) * (wide + 16) + 16) / 2
        for column, room in enumerate(row):
            place[room] = (left + column * (wide + 16), height - (number + 2) * (high + gap) + gap / 2)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"',
        ' font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for room, targets in sorted(arrows.items()):
        for target in sorted(targets):
            (x, y), (to_x, to_y) = place[room], place[target]
            ends = f'x1="{x + wide / 2:.0f}" y1="{y + high:.0f}" x2="{to_x + wide / 2:.0f}" y2="{to_y:.0f}"'
            out.append(f'<line {ends} stroke="#9ab"/>')
    boxes = [(*place[room], wide, room.replace(".", "/")) for room in sorted(place)]
    names = ", ".join(sorted(base - {""}))
    boxes.append((16, height - high - 12, width - 32, f"the ground: {names}"))
    for x, y, length, name in boxes:
        out.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{length:.0f}" height="{high}" rx="4" fill="#eef4fa" stroke="#357"/>'
        )
        out.append(f'<text x="{x + length / 2:.0f}" y="{y + 22:.0f}" text-anchor="middle">{name}</text>')
    return "\n".join([*out, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the rooms of the code and the arrows between them.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to read")
    parser.add_argument("--table", action="store_true", help="print the rooms as a Markdown table")
    parser.add_argument("--svg", type=Path, help="write the picture to this file")
    options = parser.parse_args()
    house = House.read(options.root)
    if options.svg:
        options.svg.write_text(svg(house))
    print(table(house) if options.table else report(house))


if __name__ == "__main__":
    main()
