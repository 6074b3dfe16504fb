# SPDX-License-Identifier: Apache-2.0
"""What the dashboard does, in a real browser: what its dialogs said, only after they were agreed to, and only for who
may."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from loracache import CacheClient, Namespace
from loracache.keys import salt_digest
from loracache.rest.tokens import add_token, tokens_path

pytestmark = pytest.mark.timeout(120)

Chain = Callable[..., list[str]]
REFUSED = "Failed to load resource: the server responded with a status of"


def row(id_: str) -> str:
    return f'li[data-id="{id_}"]'


def opened(page: Any, id_: str) -> None:
    page.click(f"{row(id_)} > .row .toggle")
    page.find(f"{row(id_)} .inside li")


def look_at(page: Any, key: str) -> None:
    """Find an object by its key, and show its buttons."""
    page.script("document.querySelector('#query').value = arguments[0]", key)
    page.script("document.querySelector('#search').requestSubmit()")
    page.wait(lambda: page.text(".details [data-fact=key]") == key, "the object's details")


def ask(page: Any, verb: str, group: str = "") -> None:
    """Press a button of the node that is shown, and wait for what the dialog says of it."""
    page.click(f'.details .actions{group} [data-verb="{verb}"]')
    page.says(".about", "Now there")


def agree(page: Any) -> str:
    page.click("#action-confirm")
    page.wait(lambda: not page.find("#action-confirm").is_displayed(), "an answer")
    told = page.text("#action-result")
    page.click("#action-cancel")
    page.wait(lambda: not page.all("dialog[open]"), "the dialog is closed")
    return str(told)


def choose(page: Any, name: str, value: str) -> None:
    page.script(
        "const field = document.querySelector(`#action [name=${arguments[0]}]`); field.value = arguments[1];"
        "field.dispatchEvent(new Event('input', {bubbles: true}))",
        name,
        value,
    )


def only(page: Any, tier: str) -> None:
    for box in page.all("#action [name=tiers]"):
        if box.get_attribute("value") != tier:
            box.click()


def held(anybody: httpx.Client, key: str) -> dict[str, Any] | None:
    objects = anybody.get("/v1/objects", params={"key": key}).json()["objects"]
    return objects[0] if objects else None


def test_nothing_is_sent_before_somebody_agrees(page: Any, token: str, kv: Chain, anybody: httpx.Client) -> None:
    (key,) = kv(1, model="ask")
    page.open(token)
    look_at(page, key)
    before = held(anybody, key)
    for verb, said in (
        ("pin", f"Keeps chunk {key[:12]}… in cpu until it is unpinned."), ("unpin", "Ends pins of"),
        ("evict", f"Removes chunk {key[:12]}… from cpu, disk."), ("move", "Brings chunk"),
    ):  # fmt: skip
        ask(page, verb)
        assert page.text(".says").startswith(said)
        assert "1 object, 1000 B in cpu" in page.text(".about")
        page.click("#action-cancel")
        page.wait(lambda: not page.all("dialog[open]"), "the dialog is closed")
        focused = page.script("return document.activeElement.dataset.verb")
        assert focused == verb  # back on the button
        ask(page, verb)
        page.find("#action").send_keys("\ue00c")  # escape
        page.wait(lambda: not page.all("dialog[open]"), "the dialog is closed")
    assert page.changes() == []
    assert held(anybody, key) == before


def test_pin_keeps_unpin_frees_and_evict_says_what_it_skipped(
    page: Any, token: str, kv: Chain, anybody: httpx.Client, client: CacheClient
) -> None:
    (key,) = kv(1, model="keep")
    client.flush()
    page.open(token)
    look_at(page, key)
    ask(page, "pin")
    choose(page, "ttl", "4000")
    assert not page.find("#action-confirm").is_enabled()
    choose(page, "ttl", "60")
    assert "for 60 seconds" in page.text(".says")
    assert agree(page) == "Done: 1 object."
    assert held(anybody, key)["pinned"] == ["cpu"]  # type: ignore[index]
    page.says(".details [data-fact='pinned in']", "cpu")
    page.find(f"{row(key)} .chip.pinned")

    ask(page, "evict")
    told = agree(page)
    assert "Done: 1 object, 1000 B." in told  # of the disk
    assert "Skipped 1: 1 leased, pinned, named, or needed by what is." in told
    assert held(anybody, key)["tiers"] == ["cpu"]  # type: ignore[index]

    ask(page, "unpin")
    assert agree(page) == "Done: 1 object."
    assert held(anybody, key)["pinned"] == []  # type: ignore[index]
    ask(page, "evict")
    assert agree(page) == "Done: 1 object, 1000 B."
    assert held(anybody, key) is None
    assert page.changes() == [f"/v1/{verb}?wait=5" for verb in ("pin", "evict", "unpin", "evict")]


def test_move_and_copy_and_evict_from_one_tier(
    page: Any, token: str, kv: Chain, anybody: httpx.Client, client: CacheClient
) -> None:
    (key,) = kv(1, model="move")
    client.flush()
    page.open(token)
    look_at(page, key)
    ask(page, "evict")
    only(page, "cpu")
    assert page.text("#action-confirm") == "Evict from cpu"
    assert agree(page) == "Done: 1 object, 1000 B."
    assert held(anybody, key)["tiers"] == ["disk"]  # type: ignore[index]

    ask(page, "move")
    choose(page, "source", "disk")
    assert "Choose two tiers" in page.text("#action .wrong")
    assert not page.find("#action-confirm").is_enabled()
    choose(page, "tier", "cpu")
    choose(page, "keep", "kept")
    assert "it stays in disk too" in page.text(".says")
    assert agree(page).startswith("Done: 1 object")
    assert held(anybody, key)["tiers"] == ["cpu", "disk"]  # type: ignore[index]

    ask(page, "move")
    choose(page, "source", "disk")
    choose(page, "tier", "cpu")
    assert "removes it from disk" in page.text(".says")
    agree(page)
    assert held(anybody, key)["tiers"] == ["cpu"]  # type: ignore[index]


def test_an_adapter_and_its_kv_are_two_things(
    page: Any,
    token: str,
    kv: Chain,
    adapter: Callable[[str], SimpleNamespace],
    anybody: httpx.Client,
    client: CacheClient,
) -> None:
    made = adapter("act/on")
    keys = kv(3, made.digest, "act")
    client.flush()  # what is being written is skipped
    page.open(token)
    page.click(f"{row(f'adapter:{made.digest}')} .name")
    ask(page, "pin", '[aria-label="The adapter"]')
    assert "adapter act/on in cpu" in page.text(".says")
    assert agree(page) == "Done: 1 object."
    assert held(anybody, keys[0])["pinned"] == []  # type: ignore[index]
    page.says(".details [data-fact='pinned in']", "cpu")

    ask(page, "evict", '[aria-label="Its KV"]')
    assert "the KV of adapter act/on" in page.text(".says")
    assert "3 objects, 2.93 KiB in cpu" in page.text(".about")
    agree(page)
    assert [held(anybody, key) for key in keys] == [None] * 3
    assert anybody.get("/v1/adapters/act/on").json()["tiers"][0] == "cpu"
    page.wait(
        lambda: page.title(f"{row(f'adapter:{made.digest}')} [data-field=cpu]").startswith("0 obj"), "its KV left"
    )


def test_a_namespace_is_evicted_as_a_whole(
    page: Any, token: str, kv: Chain, anybody: httpx.Client, client: CacheClient
) -> None:
    keys = [key for _ in range(3) for key in kv(2, model="whole")]
    client.flush()
    page.open(token)
    opened(page, "base")
    page.script(
        "[...document.querySelectorAll('li[data-kind=space] .name')]"
        ".find((name) => name.textContent.startsWith('whole')).click()"
    )
    ask(page, "evict")
    assert "6 objects, 5.86 KiB in cpu" in page.text(".about")
    agree(page)
    assert [held(anybody, key) for key in keys] == [None] * 6


def test_without_a_token_the_buttons_ask_for_one(page: Any, token: str, kv: Chain, anybody: httpx.Client) -> None:
    (key,) = kv(1, model="sign")
    page.allowed = [f"{REFUSED} 401"]
    page.open()
    look_at(page, key)
    ask(page, "pin")
    page.click("#action-confirm")
    page.says("#token-why", "this needs `Authorization: Bearer TOKEN`")
    page.find("#token").send_keys("wrong\ue007")
    page.says("#token-error", "does not know this token")
    page.click("#token-cancel")
    page.says("#action-result", "Not done: this needs")
    assert held(anybody, key)["pinned"] == []  # type: ignore[index]

    page.click("#action-confirm")
    page.find("#token-dialog[open]")
    page.find("#token").send_keys(f"{token}\ue007")
    page.says("#action-result", "Done: 1 object.")
    assert held(anybody, key)["pinned"] == ["cpu"]  # type: ignore[index]
    page.click("#action-cancel")
    kept = page.script("return [sessionStorage['loracache.token'], localStorage.length, document.cookie]")
    assert kept == [token, 0, ""]
    assert token not in page.driver.page_source
    page.click("#sign-out")
    assert page.find("#sign-in").is_displayed()
    assert page.script("return sessionStorage.length") == 0


def test_what_a_token_may_not_is_said_in_words(
    page: Any, running: Any, kv: Chain, anybody: httpx.Client, eventually: Any
) -> None:
    reader = add_token(tokens_path(running.socket), "watcher", "read")
    headers = {"authorization": f"Bearer {reader}"}
    eventually(lambda: anybody.get("/v1/stats", headers=headers).status_code == 200, "the token is known")
    (key,) = kv(1, model="read")
    page.allowed = [f"{REFUSED} 403"]
    page.open(reader)
    look_at(page, key)
    ask(page, "evict")
    page.click("#action-confirm")
    page.says("#action-result", "Not done: token 'watcher' has role read; this needs operate")
    assert not page.all("#token-dialog[open]")
    assert held(anybody, key)


def test_a_tenants_token_sees_its_own_and_is_told_what_it_does_not(
    page: Any, running: Any, client: CacheClient, anybody: httpx.Client, eventually: Any
) -> None:
    digest = salt_digest("its salt")
    root = client.register(Namespace("shared", "float16", "layout", 16, salt=digest), ["shared"])
    with client.reserve(root, [b"t" * 32], [1000]) as reservation:
        assert reservation.causes == [""]
    tenant = add_token(tokens_path(running.socket), "tenant", "operate", digest)
    headers = {"authorization": f"Bearer {tenant}"}
    eventually(lambda: anybody.get("/v1/tree", headers=headers).status_code == 200, "the token is known")
    page.allowed = [f"{REFUSED} 403"]
    page.open(tenant)
    page.says("#banner", "Not shown to this token: token 'tenant' is a tenant's")
    opened(page, "base")
    assert [name.text.splitlines()[0] for name in page.all("li[data-kind=space] .name")] == [
        f"shared float16, 16 tokens a chunk, tenant {digest[:8]}"
    ]
    page.script("document.querySelector('#query').value = 'shared'")
    page.click("#search [type=submit]")
    page.says("#model-held", "cpu: 1 object")
    page.find("#tree > ul > li[data-kind=space]")


def test_a_wrong_token_is_asked_for_again(page: Any, token: str) -> None:
    page.open(token)
    page.allowed = [f"{REFUSED} 401"]
    page.script("sessionStorage['loracache.token'] = 'stale'")
    page.says("#state", "needs a token")
    page.find("#token-dialog[open]")
    page.find("#token").send_keys(f"{token}\ue007")
    page.says("#state", "connected")


def test_events_come_as_they_happen_and_a_pause_misses_none(
    page: Any, operator: httpx.Client, kv: Chain, client: CacheClient
) -> None:
    (key,) = kv(1, model="events")
    page.open()
    page.says("#events-note", "live")
    selector = {"selector": {"keys": [key]}}
    operator.post("/v1/pin", json=selector)
    page.wait(lambda: page.all("#events tr[data-event=pinned]"), "the pin")
    page.click("#events-pause")
    page.says("#events-note", "paused")
    operator.post("/v1/unpin", json=selector)
    operator.post("/v1/pin", json=selector)
    page.click("#events-pause")
    page.wait(lambda: len(page.all("#events tr[data-event=pinned]")) == 2, "what happened in the pause")
    assert len(page.all("#events tr[data-event=unpinned]")) == 1
    page.click("#events tr[data-event=unpinned] button.key")
    page.wait(lambda: page.text(".details [data-fact=key]") == key, "the event's object is found")
    for _ in range(2):
        kv(120, model="events")
    page.wait(lambda: len(page.all("#events tbody tr")) == 100, "a bounded list")
