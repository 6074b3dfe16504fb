# SPDX-License-Identifier: Apache-2.0
"""Print the lowest version that pyproject.toml declares of each dependency, as constraints for pip.

    python scripts/lowest.py > constraints.txt

Of what the package needs and of its extras `otel` and `plot`; vLLM, torch and Triton have tests of their own
(`make test-vllm`).
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = ("otel", "plot")


def lowest(pyproject: str) -> list[str]:
    """ "name==version" of each, from the text of a pyproject.toml. Raises ValueError for one without a lower bound."""
    project = tomllib.loads(pyproject)["project"]
    needed = project["dependencies"] + [each for extra in EXTRAS for each in project["optional-dependencies"][extra]]
    found = []
    for requirement in needed:
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?>=([0-9.]+)", requirement)
        if match is None:
            raise ValueError(f"{requirement!r} has no lower bound; write it like name>=1.2")
        found.append(f"{match[1]}=={match[2]}")
    return found


if __name__ == "__main__":
    print(*lowest((ROOT / "pyproject.toml").read_text()), sep="\n")
