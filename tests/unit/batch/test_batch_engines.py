# SPDX-License-Identifier: Apache-2.0
"""`loracache batch run` over several servers: each line is answered once, whichever of them end, stay away or come
back."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loracache.batch import driver
from tests.unit.batch.openai_fake import Fake, answers, request, run, said_to, write

SEEDS = range(6)  # each takes a second or two
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_PAUSES_S", (0.01, 0.05))
    monkeypatch.setattr(driver, "_LOOK_S", 0.05)


def lines(count: int) -> list[dict[str, Any]]:
    return [request(number) for number in range(count)]


def sent(source: Path, output: Path, *fakes: Fake, more: tuple[object, ...] = ()) -> tuple[Any, dict[str, Any]]:
    """(how it ended, its report)"""
    report = output.with_suffix(".json")
    report.unlink(missing_ok=True)
    urls = [word for fake in fakes for word in ("--url", fake.url)]
    done = run(source, "-o", output, "--report", report, *urls, *more)
    return done, json.loads(report.read_text()) if report.exists() else {}


def whole(output: Path, count: int) -> bool:
    """Whether each line has its own answer, once."""
    found = answers(output)
    asked = lines(count)
    return [(each["custom_id"], each["response"]["body"]["text"]) for each in found] == [
        (line["custom_id"], said_to(line["url"], line["body"])) for line in asked
    ]


@contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=act)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def groups(fake: Fake) -> set[str]:
    return {body["prompt"][0] for body in fake.asked}


def test_several_engines_share_the_batch_by_subtrees_and_the_report_says_who_answered(
    servers: Callable[..., Fake], tmp_path: Path
) -> None:
    both = servers(), servers()
    for each in both:
        each.seconds = 0.02
    source, output = write(tmp_path / "in.jsonl", lines(100)), tmp_path / "out.jsonl"
    done, report = sent(source, output, *both, more=("--running", 4))
    assert done.exit_code == 0, done.output
    assert min(len(groups(each)) for each in both) >= 3  # five, unless one was much slower
    assert len(groups(both[0]) & groups(both[1])) <= 1
    assert whole(output, 100)
    told = [(each["url"] + "/v1", each["answered"], each["cached_tokens"]) for each in report["engines"]]
    assert told == [(each.url, len(each.asked), 3 * len(each.asked)) for each in both]


def test_an_engine_that_is_faster_takes_over_whole_groups_of_a_slower_one(
    servers: Callable[..., Fake], tmp_path: Path
) -> None:
    slow, fast = servers(), servers()
    slow.seconds, fast.seconds = 0.1, 0.002
    source, output = write(tmp_path / "in.jsonl", lines(100)), tmp_path / "out.jsonl"
    done, report = sent(source, output, slow, fast, more=("--running", 2))
    assert done.exit_code == 0, done.output
    assert whole(output, 100)
    assert len(slow.asked) < 40
    assert report["engines"][1]["taken_over"] == 50 - len(slow.asked)
    assert len(groups(slow) & groups(fast)) <= 1


def test_an_engine_that_stays_away_hands_on_what_it_had_not_answered(
    servers: Callable[..., Fake], tmp_path: Path
) -> None:
    dies, lives = servers(), servers()
    dies.seconds = lives.seconds = 0.02
    source, output = write(tmp_path / "in.jsonl", lines(100)), tmp_path / "out.jsonl"

    def end() -> None:
        until(lambda: len(dies.asked) >= 12)
        dies.close()

    with meanwhile(end):
        done, report = sent(source, output, dies, lives, more=("--running", 2, "--patience", 0.2))
    assert done.exit_code == 0, done.output
    assert whole(output, 100)
    first, second = report["engines"]
    assert (first["lost"], second["lost"]) == (1, 0)
    assert first["answered"] + second["answered"] == 100
    assert 10 <= first["answered"] < 50
    assert second["taken_over"] == 50 - first["answered"]
    turns = [body["prompt"][0] for body in lives.asked]
    # Ten groups, two in two parts; where one follows another, two requests at once may come in either order.
    assert sum(one != other for one, other in itertools.pairwise(turns)) <= 3 * 10


def test_an_engine_that_comes_back_after_its_share_was_handed_on_gets_work_again(
    servers: Callable[..., Fake], tmp_path: Path
) -> None:
    dies, lives = servers(), servers()
    dies.seconds = lives.seconds = 0.03
    source, output = write(tmp_path / "in.jsonl", lines(100)), tmp_path / "out.jsonl"
    again: list[Fake] = []

    def end() -> None:
        until(lambda: len(dies.asked) >= 6)
        dies.close()
        until(lambda: len(lives.asked) >= 30)
        again.append(servers(dies.port))
        until(lambda: len(again[0].asked) >= 10)
        lives.close()  # and the other is left alone

    with meanwhile(end):
        done, report = sent(source, output, dies, lives, more=("--running", 2, "--patience", 0.1))
    assert done.exit_code == 0, done.output
    assert whole(output, 100)
    assert [each["lost"] for each in report["engines"]] == [1, 1]


def test_an_engine_that_is_not_there_at_the_beginning_is_done_without(
    servers: Callable[..., Fake], tmp_path: Path
) -> None:
    gone, lives = servers(), servers()
    gone.close()
    source, output = write(tmp_path / "in.jsonl", lines(40)), tmp_path / "out.jsonl"
    began = time.monotonic()
    done, report = sent(source, output, gone, lives)
    assert done.exit_code == 0, done.output
    assert time.monotonic() - began < 20  # and not the patience
    assert whole(output, 40)
    assert [each["answered"] for each in report["engines"]] == [0, 40]
    lives.close()
    done, _ = sent(source, tmp_path / "other.jsonl", gone, lives)
    assert (done.exit_code, "no server answers" in done.stderr) == (1, True)


def test_the_run_ends_when_no_engine_is_left_and_what_is_answered_stays(
    servers: Callable[..., Fake], tmp_path: Path
) -> None:
    both = servers(), servers()
    for each in both:
        each.seconds = 0.02
    source, output = write(tmp_path / "in.jsonl", lines(100)), tmp_path / "out.jsonl"

    def end() -> None:
        for count, each in zip((6, 12), both, strict=True):
            until(lambda each=each, count=count: len(each.asked) >= count)  # type: ignore[misc]
            each.close()

    with meanwhile(end):
        done, _ = sent(source, output, *both, more=("--running", 2, "--patience", 0.2))
    assert done.exit_code == 1
    assert "the same command goes on" in done.stderr
    third = servers()
    done, report = sent(source, output, third)
    assert done.exit_code == 0, done.output
    assert report["resumed"] >= 14
    assert whole(output, 100)
    asked = Counter(body["prompt"] for body in third.asked)
    assert set(asked.values()) == {1}
    assert len(asked) == 100 - report["resumed"]


def test_a_proxy_that_answers_for_an_engine_that_restarts_costs_no_request_its_tries(
    servers: Callable[..., Fake], tmp_path: Path
) -> None:
    proxy = servers()
    source, output = write(tmp_path / "in.jsonl", lines(20)), tmp_path / "out.jsonl"
    proxy.healthy = False
    proxy.refuse = lambda body: None if proxy.healthy else (503, {"error": {"message": "no upstream"}})

    def mend() -> None:
        until(lambda: len(proxy.asked) >= 4)
        time.sleep(1.0)
        proxy.healthy = True

    with meanwhile(mend):
        done, report = sent(source, output, proxy)
    assert done.exit_code == 0, done.output
    assert whole(output, 20)
    assert 4 <= report["retries"] == len(proxy.asked) - 20 < 20


def test_a_proxy_whose_engine_has_not_started_is_an_engine_that_is_not_there_yet(
    servers: Callable[..., Fake], tmp_path: Path
) -> None:
    there, proxy = servers(), servers()
    proxy.healthy = proxy.lists = False
    source, output = write(tmp_path / "in.jsonl", lines(40)), tmp_path / "out.jsonl"
    alone, _ = sent(source, output, proxy)
    assert alone.exit_code == 1
    assert f"127.0.0.1:{proxy.port}/v1/models answered 503" in alone.stderr

    def start() -> None:
        until(lambda: len(there.asked) >= 4)
        proxy.healthy = proxy.lists = True

    there.seconds = 0.1
    with meanwhile(start):
        done, _ = sent(source, output, there, proxy, more=("--running", 2))
    assert done.exit_code == 0, done.output
    assert whole(output, 40)
    assert there.asked
    assert proxy.asked


@pytest.mark.parametrize("seed", SEEDS)
def test_each_line_is_answered_once_whatever_dies(
    servers: Callable[..., Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(driver, "_TRIES", 1000)  # engines die here many times a second
    chance = random.Random(seed)
    fakes = [servers() for _ in range(3)]
    ports = [fake.port for fake in fakes]
    for fake in fakes:
        fake.seconds = chance.choice([0.003, 0.01, 0.02])
    source, output = write(tmp_path / "in.jsonl", lines(200)), tmp_path / "out.jsonl"
    ended = threading.Event()

    def break_things() -> None:
        there: list[Fake | None] = list(fakes)
        while not ended.wait(chance.uniform(0.02, 0.15)):
            number = chance.randrange(3)
            fake = there[number]
            if fake is None:
                there[number] = servers(ports[number])
                there[number].seconds = 0.01  # type: ignore[union-attr]
            elif number:  # one lives
                fake.close()
                there[number] = None

    thread = threading.Thread(target=break_things)
    thread.start()
    try:
        done, report = sent(source, output, *fakes, more=("--running", 3, "--patience", chance.choice([0.02, 0.1])))
    finally:
        ended.set()
        thread.join()
    assert done.exit_code == 0, done.output
    assert whole(output, 200)
    assert sum(each["answered"] for each in report["engines"]) == report["answered"] == 200
