# SPDX-License-Identifier: Apache-2.0
"""What an engine learns of adapters is bounded: after 10,000 of them it knows those that are in use, and the last."""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from loracache.adapters import payload
from loracache.adapters.payload import AdapterDigests
from loracache.connectors.vllm.common.messages import Prefix
from loracache.connectors.vllm.common.recent import MOST_ADAPTERS, Recent
from loracache.connectors.vllm.frontend import resolver
from loracache.connectors.vllm.lora.paths import digest_in, path_of
from loracache.connectors.vllm.scheduler.adapters import ServedAdapters
from loracache.connectors.vllm.scheduler.blocks import BlockKeys
from loracache.connectors.vllm.scheduler.lora.folders import Folders
from loracache.connectors.vllm.worker.adapters import LoadedAdapters

MANY = 10_000
NOWHERE = "unix:///nowhere/loracache.sock"


def digest_of(number: object) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def sizes(thing: Any) -> dict[str, int]:
    """Of all that an object has by itself."""
    found = {name: value for name, value in vars(thing).items() if isinstance(value, dict | set | list)}
    return {name: len(value) for name, value in found.items()}


def largest(thing: Any) -> tuple[int, str]:
    return max((size, name) for name, size in sizes(thing).items())


def test_the_newest_stay_and_those_that_are_kept() -> None:
    recent: Recent[int, str] = Recent()
    for number in range(8):
        recent[number] = "a"
    recent[1] = "b"
    assert recent.used(2) == "a"
    assert recent.used(99) is None
    assert recent.drop_oldest({3, 4}, most=5) == {0: "a", 5: "a", 6: "a"}
    assert list(recent) == [3, 4, 7, 1, 2]
    assert recent.drop_oldest(recent, most=2) == {}


# -- the scheduler's side ----------------------------------------------------------------------------------------------


def test_ten_thousand_ids_of_one_adapter_that_ran_are_not_remembered(
    url: str, client: Any, make_engine: Any, make_adapter: Any, eventually: Any
) -> None:
    """Ids as names of the cache have them: another each time that a name is re-pointed."""
    adapter, engine = make_adapter("of many ids"), make_engine(url)
    client.add_adapter(adapter.path)
    engine.arrive("first", LoRARequest("first", 1, path_of(adapter.digest)))
    eventually(lambda: engine.runs("first"))  # and runs on
    for number in range(2, MANY):
        engine.arrive(str(number), LoRARequest(str(number), number, path_of(adapter.digest)))
        while not engine.runs(str(number)):
            engine.step()
        engine.end(str(number))
    assert largest(engine.admission)[0] <= MOST_ADAPTERS + 1, sizes(engine.admission)
    worker = set(engine.told)
    assert 1 in worker, "a request runs under it"
    assert len(worker) <= MOST_ADAPTERS + 1
    engine.arrive("again", LoRARequest("again", 2, path_of(adapter.digest)))
    eventually(lambda: engine.runs("again"))


def test_ten_thousand_adapters_that_never_ran_are_not_remembered(make_engine: Any) -> None:
    engine = make_engine(NOWHERE)
    for number in range(1, MANY):
        engine.arrive(str(number), LoRARequest(str(number), number, path_of(digest_of(number))))
        engine.waiting.clear()
        engine.admission.end(str(number))
        engine.step()
    assert largest(engine.admission)[0] <= 1.25 * MOST_ADAPTERS + 1, sizes(engine.admission)
    assert not sizes(engine.admission)["_waits"]


def test_folders_that_nobody_asks_for_again_are_forgotten_with_their_questions() -> None:
    numbers = iter(range(1, 1 << 30))
    abandoned: list[int] = []
    link: Any = SimpleNamespace(
        answering=lambda: True,
        ask_adapter_add=lambda place: next(numbers),
        answer=lambda number: (False, None),
        abandon=abandoned.append,
    )
    folders = Folders(link, 60.0)
    for number in range(MANY):
        folders.ask(f"/proc/self/../{'./' * (number % 100)}{'/' * (number // 100)}")
    assert largest(folders)[0] <= MOST_ADAPTERS
    assert len(set(abandoned)) == MANY - MOST_ADAPTERS


def test_what_ids_serve_is_remembered_of_the_last(tmp_path: Any) -> None:
    abandoned: list[int] = []
    numbers = iter(range(1, 1 << 30))
    served = ServedAdapters(lambda path: next(numbers), lambda number: (False, None), abandoned.append)
    for number in range(1, MANY):
        served.correct(number, digest_of(number))
        served.serves(1, digest_of(1))
    assert largest(served)[0] <= MOST_ADAPTERS
    assert served.serves(1, digest_of(1)), "it is used all the time"
    assert not served.serves(2, digest_of(2))
    for number in range(MANY, 2 * MANY):
        assert served.digest(LoRARequest("a", number, str(tmp_path))) == (False, None)
    assert largest(served)[0] <= MOST_ADAPTERS
    assert len(abandoned) == MANY - MOST_ADAPTERS


def hashed(number: int, name: str) -> Any:
    """A request whose blocks are hashed by its adapter's name alone."""
    request = SimpleNamespace(lora_request=LoRARequest(name, number, "/x"), mm_features=(), block_hashes=[])
    request._block_hasher = lambda own: [own.lora_request.lora_name]
    request.update_block_hashes = lambda: request.block_hashes.extend(request._block_hasher(request))
    request.update_block_hashes()
    return request


def test_names_that_were_forgotten_never_have_another_id_s_blocks() -> None:
    keys, blocks = BlockKeys(), defaultdict(set)
    for number in range(1, MANY):
        name = f"name {number % 5_000}"
        request = hashed(number, name)
        keys.key(request)
        blocks[request.block_hashes[0]].add(number)
        keys.learn({number: 1})
    assert largest(keys)[0] <= MOST_ADAPTERS
    assert max(map(len, blocks.values())) == 1


# -- the worker's side -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stock", [True, False])
def test_a_worker_forgets_ids_and_uses_no_number_twice(stock: bool) -> None:
    """stock: vLLM's own manager says which ids are in use; else the scheduler says which are not."""
    changed: list[int] = []
    loaded = LoadedAdapters(changed.append)
    if stock:
        loaded._manager = SimpleNamespace(list_adapters=lambda: {1, 2})
    told: dict[int, set[int]] = defaultdict(set)
    for turn in range(2):
        for number in range(1, MANY):
            loaded.step += 1
            loaded.confirm(number, digest_of(number + turn))
            if not stock and number > 2:
                loaded.forget([number])
            else:
                _, contents = loaded.take_news()
                assert told[number].isdisjoint(contents.values())
                told[number].update(contents.values())
    assert largest(loaded)[0] <= MOST_ADAPTERS
    assert (loaded.digest(1), loaded.digest(2)) == (digest_of(2), digest_of(3))
    forgotten = 5
    assert loaded.digest(forgotten) is None
    prefix = Prefix(forgotten, 1, (7, 8))
    assert loaded.stale_blocks([prefix]) == {7, 8}, "of which content nobody knows"
    loaded.step += 1
    loaded.confirm(forgotten, digest_of(0))
    assert loaded.stale_blocks([prefix]) == {7, 8}
    _, contents = loaded.take_news()
    assert contents[forgotten] > 1
    assert not loaded.stale_blocks([Prefix(forgotten, contents[forgotten], (9,))])
    assert not loaded.computed_with(forgotten, digest_of(0), loaded.step), "it may have begun before"
    assert loaded.computed_with(forgotten, digest_of(0), loaded.step + 1)


def test_an_id_that_was_never_seen_begins_with_one_as_ever() -> None:
    loaded = LoadedAdapters(lambda adapter: None)
    loaded.confirm(3, digest_of(3))
    loaded.forget([3])
    loaded.confirm(4, digest_of(4))
    assert loaded.take_news() == ({4: digest_of(4)}, {4: 1})
    assert loaded.computed_with(4, digest_of(4), 0)


def test_the_scheduler_hears_again_of_a_number_that_it_forgot() -> None:
    loaded = LoadedAdapters(lambda adapter: None)
    for number in range(3):
        loaded.confirm(1, digest_of(number))
    loaded.take_news()
    assert loaded.stale_blocks([Prefix(1, 0, (4,))]) == {4}
    assert loaded.take_news() == ({1: digest_of(2)}, {1: 3})


def test_digests_of_folders_are_remembered_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload, "folder_identity", lambda path: (int(path),) * 10)
    monkeypatch.setattr(payload, "adapter_digest", digest_of)
    digests = AdapterDigests()
    for number in range(MANY):
        assert digests.digest(str(number))[0] == digest_of(number)
    assert largest(digests)[0] <= payload._MOST_KNOWN


# -- the front end -----------------------------------------------------------------------------------------------------


def test_names_of_the_cache_are_remembered_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    class Questions:
        def __init__(self, server: str) -> None:
            pass

        async def digest(self, name: str) -> str | None:
            return digest_of(len(name)) if name.startswith("known") else None

    async def add_lora(request: LoRARequest) -> None:
        await asyncio.sleep(0)

    async def stock(name: str) -> str:
        async with models.lora_resolver_lock[name]:  # as vLLM does
            return "404"

    monkeypatch.setattr(resolver, "NameQuestions", Questions)
    transfer = SimpleNamespace(
        kv_connector="LoRACacheConnector", kv_connector_extra_config={"server": NOWHERE}, engine_id="e"
    )
    numbers = iter(range(1, 1 << 30))
    models: Any = SimpleNamespace(
        engine_client=SimpleNamespace(vllm_config=SimpleNamespace(kv_transfer_config=transfer), add_lora=add_lora),
        lora_requests={"given": LoRARequest("given", 1 << 20, "/a/folder")},
        resolve_lora=stock,
        lora_id_counter=SimpleNamespace(inc=lambda by: next(numbers)),
        lora_resolver_lock=defaultdict(asyncio.Lock),
    )
    resolver.resolve_names_through_the_cache(models)

    async def ask() -> None:
        for number in range(MANY):
            assert await models.resolve_lora(f"unknown {number}") == "404"
            found = await models.resolve_lora(f"known {number}")
            assert digest_in(found.lora_path) is not None
            first = await models.resolve_lora("known 0")
            assert first.lora_int_id == 1, "it is asked for all the time"

    asyncio.run(ask())
    assert len(models.lora_requests) <= MOST_ADAPTERS + 1
    assert models.lora_requests["given"].lora_path == "/a/folder"
    assert not models.lora_resolver_lock._locks
