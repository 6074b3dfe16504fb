# SPDX-License-Identifier: Apache-2.0
"""A minute of `make chaos`: faults by the second under load, mutated frames, made-up calls. The seed is printed, and
LORACACHE_CHAOS_SEED gives it again.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHAOS = Path(__file__).parent / "chaos" / "chaos.py"
SEED = os.environ.get("LORACACHE_CHAOS_SEED", str(secrets.randbelow(10**9)))


def living(folder: Path) -> list[str]:
    """Command lines of all that was started with this folder for temporary files."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"TMPDIR={folder}".encode() in (process / "environ").read_bytes().split(b"\0")
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended
            continue
        if ours and line:
            found.append(line)
    return found


@pytest.fixture
def chaos(short_tmp: Path, eventually: Callable[..., Any]) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """chaos(*arguments) starts one, with a pipe for what it prints. It has to leave nothing behind."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(CHAOS), *arguments]
        environment = os.environ | {"TMPDIR": str(short_tmp)}
        output = subprocess.PIPE
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=50)
    eventually(lambda: not living(short_tmp), "everything that it started has ended")
    assert str(short_tmp) not in Path("/proc/mounts").read_text()
    assert not list(short_tmp.iterdir())


@pytest.mark.timeout(700)
def test_a_minute_of_faults_frames_and_calls_finds_nothing_that_must_never_be(
    chaos: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    for minute in range(3):
        seed, path = str(int(SEED) + minute), tmp_path / "report.json"
        process = chaos("--minutes", "1", "--seed", seed, "--report", str(path))
        output, _ = process.communicate(timeout=240)
        print(output)  # noqa: T201 - with the seed
        report = json.loads(path.read_text())
        assert report["found"] == []
        assert process.returncode == 0
        assert report["faults"]["faults"] > 50
        assert report["frames"]["frames"] > 1000
        assert report["calls"]["calls"] > 200
        if report["faults"]["checked"].get("acknowledged objects read after a restart"):
            return
    pytest.fail("the disk of each life in three minutes was too small, or had just been cleared: nothing was due")


@pytest.mark.timeout(150)
def test_a_chaos_that_is_told_to_end_leaves_nothing_behind(
    chaos: Callable[..., subprocess.Popen[str]], short_tmp: Path, eventually: Callable[..., Any]
) -> None:
    process = chaos("--minutes", "5", "--only", "faults", "--seed", "1")
    eventually(lambda: any("--disk-sync" in line for line in living(short_tmp)), "a daemon is up", 60)
    process.send_signal(signal.SIGTERM)
    assert process.wait(50) == 128 + signal.SIGTERM
