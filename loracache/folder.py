# SPDX-License-Identifier: Apache-2.0
"""The folders that are kept beside the disk tier, which may be out of reach when a daemon starts."""

from __future__ import annotations

from pathlib import Path

__all__ = ["make_folder"]


def make_folder(path: Path) -> str:
    """Make a folder unless it is there. Answers in words why that cannot be done now, "" where it is there; raises
    OSError for what no waiting makes a folder of ours.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError):
        raise
    except OSError as error:
        return error.strerror or str(error)
    return ""
