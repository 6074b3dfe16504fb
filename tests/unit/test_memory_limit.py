# SPDX-License-Identifier: Apache-2.0
"""An arena stays within what the machine has and within the limit of every control group that the daemon is in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loracache.memory_limit import BESIDE_THE_ARENA, available_memory

GIB = 1 << 30
V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


def machine(root: Path, groups: str, limits: dict[str, str]) -> Path:
    """A machine with 64 GiB available; this process is in `groups`, and files under /sys/fs/cgroup are `limits`."""
    files = {"proc/meminfo": f"MemTotal: 9 kB\nMemAvailable: {64 << 20} kB\n", "proc/self/cgroup": groups}
    for name, text in (files | {f"sys/fs/cgroup/{name}": text for name, text in limits.items()}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "limits", "least"),
    [
        ("", {}, None),
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("0::/\n", {"memory.max": f"{8 * GIB}\n"}, 8 * GIB),
        ("0::/system.slice/a.service\n", {"system.slice/a.service/memory.max": f"{8 * GIB}\n"}, 8 * GIB),
        (
            "0::/system.slice/a.service\n",
            {"system.slice/a.service/memory.max": "max\n", "system.slice/memory.max": f"{4 * GIB}\n"},
            4 * GIB,
        ),
        ("4:memory:/a/b\n0::/\n", {"memory/a/memory.limit_in_bytes": f"{2 * GIB}\n"}, 2 * GIB),
        ("4:memory:/docker/x\n", {"memory/memory.limit_in_bytes": f"{3 * GIB}\n"}, 3 * GIB),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ("4:cpu,memory:/a\n", {"memory/a/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
        ("0::/\n", {"memory.max": "4096\n"}, BESIDE_THE_ARENA),
        (  # what others of the group have is taken, but for the page cache
            "0::/a\n",
            {
                "a/memory.max": f"{8 * GIB}\n", "a/memory.current": f"{5 * GIB}\n",
                "a/memory.stat": f"anon 7\ninactive_file {GIB}\nactive_file {GIB}\nshmem 3\n",
            },
            5 * GIB,
        ),
        (
            "4:memory:/a/b\n",
            {
                "memory/a/memory.limit_in_bytes": f"{8 * GIB}\n", "memory/a/memory.usage_in_bytes": f"{6 * GIB}\n",
                "memory/a/memory.stat": f"inactive_file {4 * GIB}\ntotal_inactive_file {GIB}\ntotal_active_file 0\n",
            },
            3 * GIB,
        ),
        ("0::/a\n4:memory:/\n", {"unified/a/memory.max": f"{2 * GIB}\n"}, 2 * GIB),
    ],
)  # fmt: skip
def test_the_lowest_limit_counts_less_what_the_daemon_needs_itself(
    groups: str, limits: dict[str, str], least: int | None, tmp_path: Path
) -> None:
    expected = 64 * GIB if least is None else least - BESIDE_THE_ARENA
    assert available_memory(machine(tmp_path, groups, limits)) == expected


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of this machine with a limit of 512 MiB."""
    v1 = (V1 / "cgroup.procs").exists()
    folder = (V1 if v1 else V2) / f"loracache-limit-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(GIB // 2))
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield folder
    folder.rmdir()


def test_a_daemon_in_a_limited_group_refuses_an_arena_that_would_get_it_killed(group: Path, short_tmp: Path) -> None:
    serve = [sys.executable, "-m", "loracache", "serve", "--socket", str(short_tmp / "s"), "--memory", "400MiB"]
    enter = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
    done = subprocess.run([*enter, *serve], capture_output=True, text=True, timeout=50, check=False, env=environment)
    assert done.returncode == 2
    assert "is more than the 0.3 GiB" in done.stderr
    assert "give --memory less" in done.stderr


@pytest.mark.parametrize(
    ("limit", "memory", "said"),
    [("-v 1000000", "1200MiB", "ulimit -v is 1.0 GiB"), ("-f 100000", "200MiB", "ulimit -f is 0.0 GiB")],
)
def test_a_limit_of_the_process_ends_the_start_with_its_name_and_no_traceback(
    limit: str, memory: str, said: str, short_tmp: Path
) -> None:
    serve = [sys.executable, "-m", "loracache", "serve", "--socket", str(short_tmp / "s"), "--memory", memory]
    bound = ["sh", "-c", f'ulimit {limit} && exec "$@"', "sh"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
    done = subprocess.run([*bound, *serve], capture_output=True, text=True, timeout=50, check=False, env=environment)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert said in done.stderr
    assert "give --memory less, or this process more" in done.stderr
