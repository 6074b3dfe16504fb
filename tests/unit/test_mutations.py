# SPDX-License-Identifier: Apache-2.0
"""The table of mutations fits the code: what it would break is there. `scripts/mutations.py` breaks it."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutation_table import Mutation  # scripts/mutation_table.py
from mutations import MUTATIONS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.promise)
def test_a_mutation_breaks_a_line_that_is_there_once(mutation: Mutation) -> None:
    source = (ROOT / mutation.file).read_text()
    assert source.count(mutation.old) == 1
    compile(source.replace(mutation.old, mutation.new), mutation.file, "exec")
    for test in mutation.tests.split():
        assert (ROOT / test.partition("::")[0]).exists(), test


def test_promises_are_told_apart() -> None:
    promises = [mutation.promise for mutation in MUTATIONS]
    assert len(promises) == len(set(promises))
