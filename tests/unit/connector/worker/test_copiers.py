# SPDX-License-Identifier: Apache-2.0
"""What the worker's copiers are told."""

from __future__ import annotations

from typing import Any

import pytest

from loracache.connectors.vllm.link import pinned
from loracache.kernels.page_copy import PageCopier


def test_copiers_know_what_is_pinned_and_which_way_small_runs_go(
    daemon: Any, make_side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, seen = PageCopier.__init__, []

    def watched(copier: PageCopier, layers: Any, **options: Any) -> None:
        seen.append(options)
        begin(copier, layers, **options)

    monkeypatch.setattr(PageCopier, "__init__", watched)
    make_side(daemon().url, bounce_below="64KiB")
    assert seen == [{"pieces": pinned.pieces, "bounce_below": 65536}] * 2
