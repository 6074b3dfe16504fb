# SPDX-License-Identifier: Apache-2.0
"""Media are keyed by what the model is given of them: items as vLLM's processors make them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)

from loracache.connectors.vllm.link.scheduler import SchedulerLink
from loracache.connectors.vllm.scheduler.media import MediaContents, item_content

CHUNK = 32


def item(**values: Any) -> MultiModalKwargsItem:
    fields = {}
    for name, value in values.items():
        try:
            fields[name] = MultiModalFieldElem(data=value, field=MultiModalBatchedField())
        except TypeError:  # up to 0.27 it holds its place too
            fields[name] = MultiModalFieldElem("image", name, value, MultiModalBatchedField())
    return MultiModalKwargsItem(fields)


def image(value: float, *, identifier: str = "counter-0", offset: int = CHUNK + 4, data: Any = None) -> Any:
    pixels = data if data is not None else item(pixel_values=torch.full((3, 4), value), grid=torch.tensor([1, 2]))
    return MultiModalFeatureSpec(
        data=pixels, modality="image", identifier=identifier, mm_position=PlaceholderRange(offset=offset, length=8)
    )


@pytest.fixture
def keys_of(driver: Any, make_request: Any, eventually: Any) -> Callable[..., list[bytes] | None]:
    """Keys of the chunks of a request with these media; None where it is not cacheable."""

    def keys(*features: Any, **rest: Any) -> list[bytes] | None:
        request = make_request("a", 3 * CHUNK, mm_features=list(features), **rest)
        driver.side.on_new_request(request)
        state = driver.side._requests.pop("a")
        eventually(state.media.done, "they are hashed")
        driver.side._lookups.advance(state)
        return list(state.chunk_keys) if state.cacheable else None

    return keys


def test_placeholders_of_images_do_not_stand_for_one_another(driver: Any, make_request: Any, keys_of: Any) -> None:
    plain = driver.keys(make_request("a", 3 * CHUNK))
    cat, dog, later = (
        keys_of(image(value, identifier=f"{value}{at}", offset=CHUNK + at)) for value, at in [(1, 4), (2, 4), (1, 5)]
    )
    assert plain[0] == cat[0] == dog[0] == later[0]
    assert len({plain[1], cat[1], dog[1], later[1]}) == 4
    assert len({plain[2], cat[2], dog[2], later[2]}) == 4


def test_an_image_is_its_content_whatever_it_is_called(keys_of: Any, make_driver: Any) -> None:
    """vLLM calls it by a counter, by its caller's text, or with an adapter's name before."""
    assert keys_of(image(1, identifier="renderer0-mm-1-image-0")) == keys_of(image(1, identifier="my-uuid"))


def test_a_name_that_two_images_share_is_believed_for_neither(keys_of: Any) -> None:
    assert keys_of(image(1, identifier="x"))
    assert keys_of(image(1, identifier="x"))
    assert keys_of(image(2, identifier="x")) is None
    assert keys_of(image(1, identifier="x")) is None  # the engine may compute it with the other's encoder output
    assert keys_of(image(3, identifier="y"))


def test_a_request_that_is_not_cached_puts_its_images_names_in_doubt_too(
    driver: Any, make_request: Any, keys_of: Any
) -> None:
    """The engine keeps the encoder outputs of all requests."""
    first = make_request("streams", 3 * CHUNK, mm_features=[image(2.0, identifier="shared")], resumable=True)
    driver.side.on_new_request(first)
    assert keys_of(image(1.0, identifier="shared")) is None
    assert keys_of(image(3.0, identifier="its own")) is not None


def test_a_request_under_way_is_stored_no_more_once_its_image_is_in_doubt(
    driver: Any, make_request: Any, keys_of: Any, eventually: Any
) -> None:
    request = make_request("b", 3 * CHUNK, mm_features=[image(1, identifier="x")])
    driver.side.on_new_request(request)
    eventually(driver.side._requests["b"].media.done, "it is hashed")
    driver.step({request: [0, 1, 2, 3, 4, 5]})
    keys_of(image(2, identifier="x"))
    request.num_computed_tokens = 3 * CHUNK
    assert not driver.step(more={request: []}).stores


def test_a_request_waits_for_its_hash_and_is_stored_then(
    driver: Any, make_request: Any, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    from threading import Event

    from loracache.connectors.vllm.scheduler import media

    go, hash_item = Event(), media.item_content
    monkeypatch.setattr(media, "item_content", lambda *item: go.wait(10) and hash_item(*item))
    request = make_request("b", 3 * CHUNK, mm_features=[image(1)])
    assert driver.arrive(request) == (None, False)
    driver.step({request: [0, 1, 2, 3, 4, 5]})
    request.num_computed_tokens = 3 * CHUNK
    assert not driver.step(more={request: []}).stores
    go.set()
    eventually(driver.side._requests["b"].media.done, "it is hashed")
    (store,) = driver.step(more={request: []}).stores
    assert len(store.chunks) == 3


def test_a_lost_daemon_is_found_again_while_images_are_hashed(
    make_driver: Any, make_request: Any, daemon: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a question looked for it, and an engine whose every request waits for a hash asked none."""
    running = daemon()
    link = SchedulerLink(running.url)
    driver = make_driver(link=link, lookup_wait=10.0)
    hashed: Future[None] = Future()
    monkeypatch.setattr(driver.side._namespace._media, "ask", lambda features: hashed)
    eventually(link.begin, "it is there")
    running.stop()
    daemon(socket=running.socket)
    eventually(lambda: not link.answering(), "it is lost")
    names = map(str, itertools.count())

    def waits() -> bool:
        request = make_request(next(names), 2 * CHUNK, mm_features=[image(1.0)])
        driver.side.on_new_request(request)
        answer = driver.side.matched_tokens(request, 0)
        driver.side.finished(request, [[]])
        return bool(answer == (None, False))

    eventually(waits, "a request waits for its hash, as there is a daemon to ask then")
    driver.side.close()


@pytest.mark.parametrize(
    "data",
    [
        None,  # the engine has its encoder output from elsewhere
        item(address=64, monotonic_id=7, signature=[1, 2]),  # what vLLM's shared-memory cache sends
        item(pixel_values=None),
        item(pixel_values=torch.empty(2, device="meta")),
        item(pixel_values=torch.ones(2), what=object()),
        item(pixel_values=np.array([object()])),
        {},
        "text",
    ],
    ids=lambda data: type(data).__name__,
)
def test_what_cannot_be_hashed_is_not_cached(data: Any) -> None:
    features = [image(1, identifier="known"), image(0, identifier="unknown")]
    features[1].data = data
    contents = MediaContents()
    assert contents.ask(features).result(10) is None
    known = contents.ask([image(5, identifier="unknown")]).result(10)
    assert known is not None
    assert contents.doubted(known)


def test_encoder_outputs_of_another_engine_are_not_cached(
    make_driver: Any, make_config: Any, make_request: Any
) -> None:
    """They are found by identifier, whatever the data beside it says."""
    driver = make_driver(make_config(ec_transfer_config=object()))
    for features, cacheable in (([image(1)], False), ([], True)):
        driver.side.on_new_request(make_request("a", 3 * CHUNK, mm_features=features))
        assert driver.side._requests.pop("a").cacheable == cacheable


def test_a_failure_of_hashing_is_no_failure_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from loracache.connectors.vllm.scheduler import media

    monkeypatch.setattr(media, "item_content", lambda *item: 1 / 0)
    assert MediaContents().ask([image(1)]).result(10) is None


def test_an_item_that_the_engine_keeps_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from loracache.connectors.vllm.scheduler import media

    calls, hash_item = [], media.item_content
    monkeypatch.setattr(media, "item_content", lambda *item: calls.append("call") or hash_item(*item))
    contents, kept = MediaContents(), item(pixel_values=torch.ones(4))
    for _ in range(3):
        assert contents.ask([image(0, data=kept)]).result(10)
    assert len(calls) == 1
    del kept, calls[:]
    found: set[object] = set()
    for value in range(50):  # others in the place of one that is gone
        data = item(pixel_values=torch.full((4,), value))
        found.update(contents.ask([image(0, identifier=str(value), data=data)]).result(10) or ())
    assert len(found) == len(calls) == 50
    assert len(contents._hashed) <= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_tensors_of_every_dtype_and_layout_are_hashed(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).reshape(4, 6).to(dtype)
    content = item_content("image", item(x=tensor))
    assert content is not None
    assert content == item_content("image", item(x=tensor.t().contiguous().t()))
    others = [tensor.reshape(6, 4), tensor[:3], tensor.to(torch.float64), [tensor], [tensor, tensor]]
    assert len({content, *(item_content("image", item(x=other)) for other in others)}) == 6
    assert item_content("audio", item(x=tensor)) != content
    assert item_content("image", item(y=tensor)) != content
    assert item_content("image", item(x=tensor, second_per_grid=1.5)) not in (content, None)
    assert item_content("image", item(x=torch.tensor(3).to(dtype))) is not None
    assert item_content("image", item(x=torch.empty(0, 3).to(dtype))) is not None


VALUES = st.recursive(
    st.integers(-3, 3)
    | st.booleans()
    | st.sampled_from(["", "a", "1", 1.5])
    | st.lists(st.integers(0, 2), max_size=3).map(lambda values: torch.tensor(values, dtype=torch.int64)),
    lambda inner: st.lists(inner, max_size=3),
)


def form(value: Any) -> Any:
    """What makes two values the same."""
    if isinstance(value, torch.Tensor):
        return ("tensor", tuple(value.tolist()))
    return tuple(form(each) for each in value) if isinstance(value, list) else (type(value), value)


@given(st.dictionaries(st.sampled_from("abc"), VALUES), st.dictionaries(st.sampled_from("abc"), VALUES))
def test_two_items_have_one_hash_exactly_where_they_are_the_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    always = torch.ones(1)
    same = {name: form(value) for name, value in one.items()} == {name: form(value) for name, value in two.items()}
    hashes = [item_content("image", item(always=always, **values)) for values in (one, two)]
    assert (hashes[0] == hashes[1]) == same


# -- everything that vLLM's own blocks are told apart by ----------

PROMPTS = st.fixed_dictionaries(
    {
        "adapter": st.sampled_from([None, "a" * 64, "b" * 64]),
        "salt": st.sampled_from([None, "one", "two"]),
        "image": st.sampled_from([None, (1, 4), (1, 5), (2, 4), (2, CHUNK + 4)]),
        "seed": st.integers(0, 1),
    }
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(one=PROMPTS, two=PROMPTS)
def test_requests_that_vllm_tells_apart_have_other_chunk_keys(
    one: dict[str, Any],
    two: dict[str, Any],
    make_driver: Any,
    make_request: Any,
    tmp_path_factory: Any,
    eventually: Any,
) -> None:
    """And those that it does not have the same."""
    from vllm.utils.hashing import sha256
    from vllm.v1.core import kv_cache_utils

    kv_cache_utils.init_none_hash(sha256)
    hasher = kv_cache_utils.get_request_block_hasher(CHUNK, sha256)
    driver = make_driver()
    folders = {digest: str(tmp_path_factory.getbasetemp() / digest[:4]) for digest in ("a" * 64, "b" * 64)}
    ours, theirs = [], []
    for number, prompt in enumerate((one, two)):
        adapter = prompt["adapter"]
        value, at = prompt["image"] or (0, 0)
        features = [image(value, identifier=f"content of {value}", offset=at)] if prompt["image"] else None
        lora = None
        if adapter is not None:
            (tmp_path_factory.getbasetemp() / adapter[:4]).mkdir(exist_ok=True)
            driver.link.digests[folders[adapter]] = adapter
            lora = LoRARequest(adapter[:4], 1 + (adapter[0] == "b"), folders[adapter])
        request = make_request(
            f"r{number}",
            2 * CHUNK,
            seed=prompt["seed"],
            mm_features=features,
            lora_request=lora,
            cache_salt=prompt["salt"],
            block_hasher=hasher,
        )
        driver.side.on_new_request(request)
        state = driver.side._requests[request.request_id]
        if features:
            eventually(state.media.done, "it is hashed")
            driver.side._lookups.advance(state)
        ours.append(list(state.chunk_keys))
        theirs.append(list(request.block_hashes))
    assert len(ours[0]) == len(ours[1]) == 2
    assert [a == b for a, b in zip(*ours, strict=True)] == [a == b for a, b in zip(*theirs, strict=True)]


def test_every_kind_of_extra_key_of_this_vllm_is_one_that_we_know() -> None:
    """A new one would be something that KV depends on beyond its tokens: say how our keys have it."""
    import inspect

    from vllm.v1.core import kv_cache_utils

    kinds = {name for name in vars(kv_cache_utils) if name.startswith("_gen_") and name.endswith("_hash_keys")}
    assert kinds == {"_gen_mm_extra_hash_keys", "_gen_lora_extra_hash_keys", "_gen_prompt_embeds_extra_hash_keys"}
    source = inspect.getsource(kv_cache_utils.generate_block_hash_extra_keys)
    added = source[source.rindex("extra_keys: list[Any] =") :].split(")")[0]
    assert set(added.replace("(", " ").split()) - {"extra_keys:", "list[Any]", "=", "+"} == {
        "lora_extra_keys",
        "mm_extra_keys",
        "cache_salt_keys",
        "prompt_embeds_keys",
    }


def test_request_without_media_asks_nothing(driver: Any, make_request: Any) -> None:
    request = make_request("a", 2 * CHUNK, mm_features=[])
    driver.side.on_new_request(request)
    assert driver.side._requests["a"].media is None
