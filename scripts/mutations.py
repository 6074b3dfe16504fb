"""Breaks one invariant after the other, in a copy of the tree, and sees that a test notices.

    .venv/bin/python scripts/mutations.py              all of them; exits 1 where one survived
    .venv/bin/python scripts/mutations.py cache leases  those whose file or promise has one of these words

The table is scripts/mutation_table.py. Whoever finds a survivor writes the test that was missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from mutation_table import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]
_TIMEOUT_S = 600
_NO_SHRINKING = """
from hypothesis import Phase, settings
settings.register_profile("mutations", phases=[Phase.explicit, Phase.generate], database=None)
settings.load_profile("mutations")
"""


class Copy:
    """The tree's files, those not committed too, where they can be broken."""

    def __init__(self, folder: Path) -> None:
        self.tree, self._site = folder / "tree", folder / "site"
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
            source, target = ROOT / name, self.tree / name
            if name and (source.is_symlink() or source.is_file()):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target, follow_symlinks=False)
        self._site.mkdir()  # `loracache` alone on the path, not the tree's root with all its folders
        (self._site / "loracache").symlink_to(self.tree / "loracache")
        (self._site / "no_shrinking.py").write_text(_NO_SHRINKING)

    def failed(self, tests: Sequence[str]) -> bool:
        """Whether a test failed, or hangs. Raises SystemExit where they could not be run."""
        path = os.pathsep.join(filter(None, (str(self._site), os.environ.get("PYTHONPATH", ""))))
        environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        pytest = str(Path(sys.executable).parent / "pytest")
        try:
            run = subprocess.run(
                [pytest, "-x", "-q", "-p", "no_shrinking", "-p", "no:cacheprovider", *tests],
                cwd=self.tree, env=environment, check=False, capture_output=True, text=True, timeout=_TIMEOUT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return True
        if run.returncode not in (0, 1):
            raise SystemExit(f"pytest {' '.join(tests)} ended with {run.returncode}:\n{run.stdout[-3000:]}{run.stderr}")
        return run.returncode == 1

    def survives(self, mutation: Mutation) -> bool:
        """Whether no test notices."""
        path = self.tree / mutation.file
        whole = path.read_text()
        path.write_text(whole.replace(mutation.old, mutation.new))
        try:
            return not self.failed(mutation.tests.split())
        finally:
            path.write_text(whole)


def main(words: Sequence[str]) -> int:
    """Number of survivors."""
    chosen = [each for each in MUTATIONS if not words or any(word in f"{each.file} {each.promise}" for word in words)]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder))
        if copy.failed(sorted({name for each in chosen for name in each.tests.split()})):
            raise SystemExit("tests fail before anything was broken")
        for each in chosen:
            started = time.monotonic()
            survived = copy.survives(each)
            survivors += survived
            took = f"{time.monotonic() - started:4.0f} s"
            print("SURVIVED" if survived else "killed  ", took, f"{each.file}: {each.promise}", flush=True)
    print(f"{len(chosen)} mutations, {survivors} survived")
    return survivors


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
