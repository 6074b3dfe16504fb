# SPDX-License-Identifier: Apache-2.0
"""A recorded trace: what it holds and what it must not, and that its replay finds what the daemon found."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loracache import CacheClient, Namespace, chunk_keys
from loracache.daemon.recorder import Recorder
from loracache.errors import ConfigError
from loracache.keys import salt_digest
from loracache.simulator.replay import replay
from loracache.simulator.store import Sizes, Way
from loracache.simulator.trace import Request, own_adapters, read_trace
from loracache.tiers import Tier
from loracache.wire import protocol

TOKENS, SIZE = 16, 60_000  # of a chunk: an object takes one page of 64 KiB
PAGE = 64 << 10
SPACE = Namespace("the model's identity", "float32", "layout", TOKENS)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Engine:
    """Asks as the connector does: a lookup by a lease of its own, loads what is there, stores what is not."""

    def __init__(self, client: CacheClient) -> None:
        self.client = client
        self.asked = self.found = self.loads = 0
        self.pages: list[str] = []  # adapters that it holds itself, two at most

    def load(self, digest: str, folder: Path) -> None:
        if digest in self.pages:
            return
        self.pages = [*self.pages, digest][-2:]
        self.loads += 1
        with self.client.acquire([bytes.fromhex(digest)]) as reading:
            if reading.slots[0] is not None:
                return
        self.client.add_adapter(str(folder))
        with self.client.acquire([bytes.fromhex(digest)]) as reading:
            assert reading.slots[0] is not None

    def serve(self, space: Namespace, tokens: list[int], *, answer: int = 0) -> None:
        digest = self.client.register(space)
        keys = chunk_keys(digest, np.array(tokens, dtype=np.int32), TOKENS)
        prompt = len(keys) - answer
        lease = os.urandom(16)
        call = self.client.connection.call
        for _ in range(1 + (self.asked % 10 == 0)):  # as after a preemption: it is one request all the same
            (tiers,) = call(protocol.Lookup(lease, protocol.join_keys(keys[:prompt]), 1, 30.0), 10).payload
        self.asked += prompt
        self.found += len(tiers)
        if tiers:
            self.client.flush()  # what waits to be written stays in memory, which is not simulated
            with self.client.acquire(keys[: len(tiers)]) as reading:
                assert all(reading.slots), reading.causes
        call(protocol.Release(lease, b""), 10)
        parents = [b"", *keys]
        for at in range(len(tiers), len(keys), 4):
            part = keys[at : at + 4]
            above = [parents[at + number] for number in range(len(part))]
            with self.client.reserve(digest, part, [SIZE] * len(part), parents=above) as room:
                for position in range(len(part)):
                    if room.slots[position] is not None:
                        room.write(position, bytes(SIZE))


def chats(
    engine: Engine, spaces: list[Namespace], count: int, seed: int, folders: dict[str, Path] | None = None
) -> None:
    """Sessions of a few turns, mixed, each turn with all before it and the answers to that."""
    chance = random.Random(seed)
    running: list[tuple[Namespace, list[int]]] = []
    for _ in range(count):
        if len(running) < 6 or chance.random() < 0.3:
            running.append((chance.choice(spaces), [chance.randrange(1000) for _ in range(TOKENS * 3)]))
        space, tokens = running[chance.randrange(len(running))]
        tokens += [chance.randrange(1000) for _ in range(TOKENS * 3)]
        if folders:
            engine.load(space.adapter, folders[space.adapter])
        engine.serve(space, tokens, answer=1)
        if chance.random() < 0.2 or len(tokens) > 30 * TOKENS:
            running.remove((space, tokens))


def peft(folder: Path, seed: int = 0, width: int = 64) -> Path:
    """A PEFT folder."""
    name = "base_model.model.model.layers.0.q_proj"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    numbers = np.random.default_rng(seed)
    sides = {"A": (4, width), "B": (width, 4)}
    tensors = {f"{name}.lora_{side}.weight": numbers.random(shape, np.float32) for side, shape in sides.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_a_replay_loads_adapters_when_an_engine_did(daemon: Any, tmp_path: Path) -> None:
    trace, memory = tmp_path / "trace", 96 * PAGE
    config = tmp_path / "config.yaml"
    config.write_text("policy: lru\n")
    running = daemon(config=config, memory=memory, record=trace)
    engine = Engine(running.client())
    folders = {}
    for number in range(5):  # 16 pages each
        folder = peft(tmp_path / f"adapter-{number}", number, 32_000)
        folders[engine.client.add_adapter(str(folder))] = folder
    spaces = [Namespace("model", "float32", "layout", TOKENS, digest) for digest in folders]
    chats(engine, spaces, 300, 3, folders)
    status = running.status()
    assert running.stop() == 0
    requests = read_trace(trace)
    assert sorted({each.adapter for each in requests}) == [0, 1, 2, 3, 4]
    assert sum(not kept.blocks for each in requests for kept in each.kept) == engine.loads
    run = replay(requests, Sizes(memory, 0, 1, own_adapters(requests)), Way.parse("lru"))
    assert status["counters"]["evict.cpu.policy"] > 200
    assert 5 < run.adapters_loaded < engine.loads
    # Adapters were there already when the first engine came; pages of a large object may be wherever there are some.
    assert run.hit_rate == pytest.approx(engine.found / engine.asked, abs=0.005)


@pytest.mark.parametrize(("policy", "disk"), [("lru", 0), ("lru", 8), ("s3fifo", 0), ("adaptive", 0)])
def test_a_replay_with_the_daemons_sizes_finds_what_the_daemon_found(
    policy: str, disk: int, daemon: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, memory = tmp_path / "trace", 64 * PAGE
    config = tmp_path / "config.yaml"
    config.write_text(f"policy: {policy}\n")
    options = {"disk_path": tmp_path / "disk", "disk": f"{disk}MiB"} if disk else {}
    running = daemon(config=config, memory=memory, record=trace, **options)
    engine = Engine(running.client())
    chats(engine, [SPACE, Namespace("another", "float32", "layout", TOKENS)], 300, seed=7)
    status = running.status()
    assert running.stop() == 0
    assert sum(n for why, n in status["evicted"]["cpu"].items() if why.startswith("policy")) > 200
    requests = read_trace(trace)
    assert (len(requests), sum(each.tokens for each in requests)) == (300, engine.asked * TOKENS)
    assert sum(each.held or 0 for each in requests) == engine.found
    run = replay(requests, Sizes(memory, disk << 20, 1), Way.parse(policy))
    # LRU in memory is the same to the last block. Files on disk take less than a page; shadows sample by random hashes.
    near = 1e-9 if (policy, disk) == ("lru", 0) else 0.03
    assert run.hit_rate == pytest.approx(engine.found / engine.asked, abs=near)
    more = replay(requests, Sizes(4 * memory, disk << 20, 1), Way.parse(policy))
    assert more.hit_rate > run.hit_rate  # what was found then is stored where it is not


def test_a_trace_holds_no_token_no_name_and_no_key(daemon: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    running = daemon(record=trace)
    tenant = Namespace("secret-model", "float32", "layout", TOKENS, "ab" * 32, salt_digest("secret-salt"))
    client = running.client(name="secret-client")
    Engine(client).serve(tenant, list(range(100_000, 100_000 + 3 * TOKENS)))
    Engine(client).serve(tenant, list(range(100_000, 100_000 + 4 * TOKENS)))
    running.stop()
    text = trace.read_text()
    digest = tenant.digest()
    keys = chunk_keys(digest, np.arange(100_000, 100_000 + 4 * TOKENS, dtype=np.int32), TOKENS)
    for secret in ("secret", "100001", tenant.adapter[:16], tenant.salt[:16], digest.hex()[:16]):
        assert secret not in text
    assert not [key for key in keys if key.hex()[:16] in text]
    assert stat.S_IMODE(trace.stat().st_mode) == 0o600
    first, said, stored, again, *_ = lines(trace)[1:]
    assert set(first) == {"time", "request", "chunks", "group", "found"}
    assert (said["chunk_tokens"], len(said["adapter"]), len(said["tenant"])) == (TOKENS, 16, 16)
    assert stored["store"] == first["chunks"]
    assert stored["bytes"] == PAGE
    assert again["chunks"].startswith(first["chunks"])
    assert (again["found"], again["tokens"]) == ({"cpu": 3}, 4 * TOKENS)
    requests = read_trace(trace)
    assert [each.tenant for each in requests] == [0, 0]
    assert [each.block_bytes for each in requests] == [PAGE, PAGE]


def test_two_files_have_nothing_in_common(daemon: Any, tmp_path: Path) -> None:
    texts = []
    for name in ("one", "two"):
        running = daemon(record=tmp_path / name)
        Engine(running.client()).serve(SPACE, list(range(2 * TOKENS)))
        running.stop()
        texts.append(next(line["chunks"] for line in lines(tmp_path / name) if "chunks" in line))
    assert not {texts[0][:16], texts[0][16:]} & {texts[1][:16], texts[1][16:]}


def test_adapters_that_engines_load_are_recorded_with_their_size(daemon: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    running = daemon(record=trace)
    client = running.client()
    digest = client.add_adapter(str(peft(tmp_path / "adapter")))
    with client.acquire([bytes.fromhex(digest)]) as reading:
        (slot,) = reading.slots
        assert slot is not None
        size = slot.size
    Engine(client).serve(Namespace("model", "float32", "layout", TOKENS, digest), list(range(2 * TOKENS)))
    Engine(client).serve(SPACE, list(range(2 * TOKENS)))
    running.stop()
    requests = read_trace(trace)
    assert own_adapters(requests) == [-(-size // PAGE) * PAGE]
    assert [each.adapter for each in requests] == [0, -1]


def test_a_second_daemon_appends_and_what_the_first_left_half_is_left_out(daemon: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for life in range(2):
        running = daemon(record=trace)
        Engine(running.client()).serve(SPACE, list(range(2 * TOKENS)))
        running.stop()
        if not life:
            with trace.open("a") as file:
                file.write('{"time": 5.0, "requ')
    found = read_trace(trace)
    assert len(found) == 2
    assert found[1].time >= found[0].time
    assert not set(found[0].blocks) & set(found[1].blocks)
    with trace.open("a") as file:
        file.write('{"time": 5.0, "requ')  # it was killed
    assert len(read_trace(trace)) == 2
    with trace.open("a") as file:
        file.write("\n{}\n")
    with pytest.raises(ConfigError, match="line"):
        read_trace(trace)


def test_a_file_that_cannot_be_a_trace_is_refused_at_the_start(
    serve_fails: Callable[..., tuple[int, str]], daemon: Any, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    there.write_text("")
    there.chmod(0o644)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    used = tmp_path / "used"
    daemon(record=used)
    for path, why in (
        (tmp_path, "directory"),
        (tmp_path / "no" / "folder", "No such file"),
        (there, "others may read it"),
        (link, "symbolic link"),
        (used, "another daemon"),
    ):
        code, told = serve_fails(record=path)
        assert code == 2
        assert "record=" in told
        assert why in " ".join(told.split()), told


def test_a_private_daemon_waits_for_the_one_before_it_to_leave_the_file(daemon: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    first = daemon(record=trace)
    ending = threading.Timer(1.0, first.send, [signal.SIGTERM])
    ending.start()
    second = daemon(record=trace, private=True)
    ending.join()
    Engine(second.client()).serve(SPACE, list(range(2 * TOKENS)))
    second.stop()
    assert len(read_trace(trace)) == 1


# -- what must not disturb a daemon ----------


class Counts(list[str]):
    """What was counted."""

    def wait(self, name: str, seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while name not in self:
            assert time.monotonic() < deadline, f"{name} is not among {set(self)}"
            time.sleep(0.01)


@pytest.fixture
def counts() -> Counts:
    return Counts()


def ask(recorder: Recorder, count: int, keys: int = 8) -> None:
    for number in range(count):
        recorder.asked(1, number.to_bytes(16, "big"), os.urandom(32 * keys), 1, [Tier.CPU], SPACE)


def test_a_full_file_ends_the_recording_with_whole_lines(tmp_path: Path, counts: Counts) -> None:
    recorder = Recorder(tmp_path / "trace", PAGE, counts.append, most_bytes=20_000)
    for _ in range(20):
        ask(recorder, 20)
        time.sleep(0.005)
    recorder.close()
    assert counts == ["record.full"]
    assert not recorder.on
    assert (tmp_path / "trace").stat().st_size <= 20_000


def test_a_full_disk_ends_the_recording_and_leaves_whole_lines(
    file_system: Callable[[int], Path], counts: Counts
) -> None:
    trace = file_system(1) / "trace"
    recorder = Recorder(trace, PAGE, counts.append)
    deadline = time.monotonic() + 30
    while recorder.on:
        assert time.monotonic() < deadline
        ask(recorder, 100)
        time.sleep(0.01)
    counts.wait("record.failed")
    ask(recorder, 10)
    recorder.close()
    assert counts == ["record.failed"]
    assert len(read_trace(trace)) > 100


def test_a_disk_that_is_full_at_the_start_keeps_no_daemon_from_starting(
    daemon: Any, file_system: Callable[[int], Path]
) -> None:
    trace = file_system(1) / "trace"
    descriptor = os.open(trace, os.O_WRONLY | os.O_CREAT, 0o600)
    with contextlib.suppress(OSError):
        while True:
            os.write(descriptor, b"x" * 4096)  # no line that is whole
    os.close(descriptor)
    running = daemon(record=trace)
    engine = Engine(running.client())
    for _ in range(2):
        engine.serve(SPACE, list(range(8 * TOKENS)))
    assert engine.found == 8
    assert running.status()["counters"]["record.failed"] == 1
    assert "nothing is recorded" in running.log()


def test_a_failing_file_fails_no_request(daemon: Any, tmp_path: Path, eventually: Callable[..., Any]) -> None:
    trace = tmp_path / "trace"
    running = daemon(record=trace)
    client = running.client()
    resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (4000, 4000))  # EFBIG, of its log, too
    engine = Engine(client)
    for _ in range(40):
        engine.serve(SPACE, list(range(8 * TOKENS)))
    eventually(lambda: client.status()["counters"].get("record.failed"))
    engine.serve(SPACE, list(range(8 * TOKENS)))
    assert engine.found == 40 * 8
    assert "nothing is recorded" in running.log()
    assert running.stop() == 0


def test_what_the_thread_does_not_keep_up_with_is_dropped_and_counted(
    tmp_path: Path, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold, write = threading.Event(), os.write
    monkeypatch.setattr("loracache.daemon.recorder._MOST_WAITING", 10_000)
    recorder = Recorder(tmp_path / "trace", PAGE, counts.append)

    def slow(descriptor: int, data: Any) -> int:
        hold.wait(20)
        return write(descriptor, data)

    monkeypatch.setattr("loracache.daemon.recorder.os.write", slow)
    monkeypatch.setattr("loracache.daemon.recorder._WRITE_BYTES", 1)
    ask(recorder, 1)
    time.sleep(0.2)
    ask(recorder, 100)
    hold.set()
    recorder.close()
    assert set(counts) == {"record.dropped"}
    assert 30 < len(read_trace(tmp_path / "trace")) + len(counts) <= 101


def test_parts_of_one_lookup_are_one_request_and_shards_share_their_tokens(tmp_path: Path, counts: Counts) -> None:
    recorder = Recorder(tmp_path / "trace", PAGE, counts.append)
    whole, rest = os.urandom(32 * 4), os.urandom(32 * 4)
    for lease in (b"a" * 16, b""):
        recorder.asked(1, lease, whole, 2, [Tier.CPU] * 4, SPACE)
        recorder.asked(1, lease, rest, 2, [Tier.DISK] * 2, SPACE)
    recorder.asked(2, b"a" * 16, whole, 2, [], None)  # another connection's
    recorder.close()
    found = read_trace(tmp_path / "trace")
    assert [(len(each.blocks), each.held, each.tokens) for each in found] == [
        (8, 6, 4 * TOKENS),
        (4, 4, 2 * TOKENS),
        (4, 2, 2 * TOKENS),
        (4, 0, 2 * TOKENS),
    ]
    assert isinstance(found[0], Request)
