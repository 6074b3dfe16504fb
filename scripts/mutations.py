# SPDX-License-Identifier: Apache-2.0
"""Breaks one invariant after the other, in a copy of the tree, and sees that a test notices.

    .venv/bin/python scripts/mutations.py              all of them; exits 1 where one survived
    .venv/bin/python scripts/mutations.py cache leases  those whose file or promise has one of these words

The table is scripts/mutation_table*.py. Whoever finds a survivor writes the test that was missing. Each is tried in a
fork of a process that has imported vLLM, which takes far longer than the tests do.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest
from mutation_table import CACHE, Mutation
from mutation_table_connector import CONNECTOR
from mutation_table_control import CONTROL
from mutation_table_within_step import WITHIN_STEP

ROOT = Path(__file__).resolve().parents[1]
MUTATIONS = [*CACHE, *CONTROL, *CONNECTOR, *WITHIN_STEP]
_TIMEOUT_S = 600
_ALREADY = "pytest.PytestAssertRewriteWarning"  # of plugins that vLLM imports
_OPTIONS = [
    "-x",
    "-q",
    "-p",
    "no_shrinking",
    "-p",
    "no:cacheprovider",
    "-W",
    "ignore::pytest.PytestAssertRewriteWarning",
]
_HEAVY = ("torch", "vllm.v1.core.sched.scheduler", "vllm.model_executor.model_loader", "fastapi")  # and none of ours
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
        log = self.tree.parent / "log"
        child = os.fork()
        if not child:
            self._test(tests, log)
        until = time.monotonic() + _TIMEOUT_S
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > until:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return True
            time.sleep(0.02)
        code = os.waitstatus_to_exitcode(ended[1])
        if code not in (0, 1):
            raise SystemExit(f"pytest {' '.join(tests)} ended with {code}:\n{log.read_text()[-3000:]}")
        return code == 1

    def _test(self, tests: Sequence[str], log: Path) -> NoReturn:
        """In the fork: run the tests of the copy, and end."""
        code = 2
        try:
            os.setsid()
            with log.open("wb") as file:
                for stream in (sys.stdout, sys.stderr):
                    os.dup2(file.fileno(), stream.fileno())
            os.chdir(self.tree)
            sys.path.insert(0, str(self._site))
            path = os.pathsep.join(filter(None, (str(self._site), os.environ.get("PYTHONPATH", ""))))
            os.environ.update(PYTHONPATH=path, PYTHONDONTWRITEBYTECODE="1")
            sys.dont_write_bytecode = True
            code = pytest.main([*_OPTIONS, *tests])
        finally:
            os._exit(code)

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
    for name in _HEAVY if any("connector" in each.tests for each in chosen) else ():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
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
