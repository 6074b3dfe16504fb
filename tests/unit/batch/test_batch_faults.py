# SPDX-License-Identifier: Apache-2.0
"""`loracache batch run` with requests, answers and files that are not as they should be: none of them ends the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from loracache.batch import driver
from tests.unit.batch.openai_fake import Fake, answers, request, run, write


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_PAUSES_S", (0.01, 0.05))


# -- while it is planned ----------


def test_a_server_that_hangs_up_while_prompts_are_tokenized_is_asked_again(server: Fake, tmp_path: Path) -> None:
    server.hang_ups = 1
    source, output = write(tmp_path / "in.jsonl", [request(number) for number in range(5)]), tmp_path / "out.jsonl"
    done = run(source, "-o", output, "--url", server.url)
    assert done.exit_code == 0, done.output
    assert len(answers(output)) == 5


def test_token_ids_that_are_none_are_told(server: Fake, tmp_path: Path) -> None:
    for tokens in ([10**12] * 40, [-1] * 40):
        server.tokens = tokens
        done = run(write(tmp_path / "in.jsonl", [request(0)]), "-o", tmp_path / "out.jsonl", "--url", server.url)
        assert (done.exit_code, "answered no list of token ids" in done.output) == (1, True)
