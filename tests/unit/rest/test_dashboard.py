# SPDX-License-Identifier: Apache-2.0
"""What the dashboard shows, in a real browser: the same as the routes say, at every width, as text."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from loracache import CacheClient
from loracache.wire import protocol

pytestmark = pytest.mark.timeout(120)

Chain = Callable[..., list[str]]
Adapter = Callable[[str], SimpleNamespace]


@pytest.fixture(scope="module")
def running(module_daemon: Any, module_redis: Any, eventually: Any, rest_is_up: Any, tmp_path_factory: Any) -> Any:
    """As the other modules' daemon, with a Redis."""
    made = module_daemon(
        http="127.0.0.1:0",
        memory="16MiB",
        page_size="4KiB",
        disk_path=tmp_path_factory.mktemp("disk"),
        disk="64MiB",
        redis=module_redis().url,
    )
    eventually(lambda: rest_is_up(made), "REST answers")
    return made


def exact(number: int) -> str:
    return f"{number:,}"


def row(id_: str) -> str:
    return f'li[data-id="{id_}"]'


def cell(id_: str, field: str) -> str:
    return f'{row(id_)} > .row [data-field="{field}"]'


def opened(page: Any, id_: str) -> None:
    page.click(f"{row(id_)} > .row .toggle")
    page.find(f"{row(id_)} .inside li")


def test_each_tier_card_shows_what_the_statistics_say(
    page: Any, client: CacheClient, kv: Chain, anybody: httpx.Client
) -> None:
    kv(12, size=500_000)
    client.flush()
    page.open()
    stats = anybody.get("/v1/stats").json()
    assert len(page.all("#tiers article")) == len(stats["tiers"]) == 3

    def shown() -> dict[str, dict[str, str]]:
        return {
            tier: {field: page.title(f'[data-tier="{tier}"] [data-field="{field}"]') for field in values}
            for tier, values in stats["tiers"].items()
        }

    def said(tier: dict[str, Any], field: str) -> str:
        if field == "used_bytes":
            return f"{exact(tier[field])} bytes of {exact(tier['limit_bytes'])}"
        if field == "waiting":
            return ", ".join(f"{what} {count}" for what, count in tier[field].items())
        if field in ("objects", "queued_writes"):
            return exact(tier[field])
        return f"{exact(tier[field])} bytes" if field in ("bytes", "populated_bytes") else ""

    expected = {tier: {field: said(values, field) for field in values} for tier, values in stats["tiers"].items()}
    page.wait(lambda: shown() == expected, f"the cards say {expected}, not {shown()}")
    for tier in stats["tiers"]:
        assert page.text(f'[data-tier="{tier}"] .badge') == "available"
    cpu = stats["tiers"]["cpu"]
    meter = page.find('[data-tier="cpu"] .meter')
    part = 100 * cpu["used_bytes"] / cpu["limit_bytes"]
    assert float(meter.get_attribute("aria-valuenow")) == pytest.approx(part, abs=0.1)
    page.wait(
        lambda: page.script(
            "const m = document.querySelector('[data-tier=cpu] .meter');"
            "return Math.abs(100 * m.firstChild.offsetWidth / m.clientWidth - arguments[0]) < 1",
            part,
        ),
        "the bar is as long as the tier is full",
    )
    assert page.text("#version") == stats["version"]


def test_the_hit_rate_is_that_of_the_lookups_since(page: Any, client: CacheClient, kv: Chain) -> None:
    keys = [bytes.fromhex(key) for key in kv(30)]
    page.open()
    client.lookup([*keys, *(bytes([number]) * 32 for number in range(10))])
    page.wait(lambda: page.title("#hit-summary") == "30 of 40 keys", "30 hits, 10 misses")
    assert page.text("#hit-summary").startswith("75.0 % in the last ")
    assert page.text("#hit-rate .legend b") == "75.0 %"
    stats: Any = client.status()
    sums = page.text("#lookups tbody")
    assert f"hit in cpu{exact(stats['hits']['cpu'])}" in sums
    assert f"miss: absent{exact(stats['misses']['absent'])}" in sums


def test_throughput_is_drawn_and_the_crosshair_looks_back(page: Any, client: CacheClient, kv: Chain) -> None:
    page.open()
    assert page.wait(lambda: page.all("#throughput .legend li"), "a legend")
    kv(200)
    client.flush()
    rises = "const p = document.querySelector(arguments[0]); return p !== null && p.getBBox().height > 5"
    written = '#throughput path.disk.dashed[d*="L"]'
    page.wait(lambda: page.script(rises, written), "what was written to the disk is a line that rises")
    names = [item.text.splitlines()[0] for item in page.all("#throughput .legend span")]
    assert names == ["stored by engines", "disk read", "disk written", "redis read", "redis written"]
    page.find("#throughput .chart svg").send_keys("\ue012\ue012\ue012\ue012")  # left
    page.says("#throughput .when", "ago")
    page.find("#throughput .chart svg").send_keys("\ue00c")  # escape
    page.says("#throughput .when", "now")


def test_the_tree_shows_adapters_and_their_kv_as_the_api_says(
    page: Any, client: CacheClient, kv: Chain, adapter: Adapter, anybody: httpx.Client
) -> None:
    made = adapter("team/tree")
    keys = kv(4, made.digest, "served/model")
    client.flush()
    engine = client.connection.call(protocol.Resident(bytes.fromhex(made.digest)), 10)
    assert engine.payload == []
    page.open()
    nodes = anybody.get("/v1/tree", params={"limit": 50}).json()["nodes"]
    (said,) = [node for node in nodes if node["digest"] == made.digest]
    assert (said["names"], said["engines"], said["objects"]) == (["team/tree"], 1, {"cpu": 4, "disk": 4})
    assert [item.get_attribute("data-id") for item in page.all("#tree > ul > li")] == [node["id"] for node in nodes]
    for tier in ("cpu", "disk"):
        assert page.title(cell(said["id"], tier)) == f"4 objects, {exact(said['bytes'][tier])} bytes"
    assert page.text(f"{row(said['id'])} > .row .name").startswith("team/tree")
    assert page.text(f"{row(said['id'])} > .row .chip.gpu") == "gpu \u00d71"
    assert page.title(cell(said["id"], "hits")) == exact(said["hits"])

    opened(page, said["id"])
    (space,) = anybody.get("/v1/tree", params={"under": said["id"]}).json()["nodes"]
    assert page.text(f"{row(space['id'])} .name") == "served/model float16, 16 tokens a chunk"
    opened(page, space["id"])
    opened(page, keys[0])
    shown = [item.get_attribute("data-id") for item in page.all(f"{row(space['id'])} li")]
    assert shown == keys  # a chain's chunks, one below the other
    page.click(f"{row(keys[3])} .name")
    assert page.text(".details [data-fact=key]") == keys[3]
    assert page.text(".details [data-fact=continues]") == keys[2]
    assert page.text(".details [data-fact='held in']") == "cpu, disk"
    page.click(f"{row(said['id'])} > .row .name")
    assert page.text(".details [data-fact='KV in disk']").startswith("4 objects, ")
    page.click(f"{row(said['id'])} > .row .toggle")
    assert not page.all(row(space["id"]))


def test_a_large_list_comes_in_pages(page: Any, kv: Chain, anybody: httpx.Client) -> None:
    for _ in range(120):
        kv(1, model="paged")
    page.open()
    (space,) = [
        node["id"]
        for node in anybody.get("/v1/tree", params={"under": "base"}).json()["nodes"]
        if node["model"] == "paged"
    ]
    opened(page, "base")
    opened(page, space)
    for count in (50, 100, 120):
        page.wait(lambda count=count: len(page.all(f"{row(space)} li[data-kind=chunk]")) == count, f"{count} rows")
        if count < 120:
            page.click(f"{row(space)} .more button")
    assert not page.all(f"{row(space)} .more")
    ids = [item.get_attribute("data-id") for item in page.all(f"{row(space)} li[data-kind=chunk]")]
    known = anybody.get("/v1/tree", params={"under": space, "limit": 200}).json()["nodes"]
    assert ids == [node["id"] for node in known]
    assert all(path.count("limit=50") for _, path in page.requests() if "under=space" in path)


def search(page: Any, text: str) -> None:
    page.script("document.querySelector('#query').value = ''")
    page.find("#query").send_keys(text, "\ue007")


def test_search_finds_adapters_by_name_objects_by_key_and_models(page: Any, kv: Chain, adapter: Adapter) -> None:
    one, other = adapter("find/me"), adapter("find/me:2")
    keys = kv(3, one.digest, "find-model")
    kv(2, model="find-model")
    page.allowed = ["/v1/lookup - Failed to load resource: the server responded with a status of 404"]  # no such model
    page.open()
    search(page, "find/me")
    page.says("#search-note", "2 matches")
    page.wait(lambda: len(page.all("#tree > ul > li")) == 2, "two rows")
    assert {item.get_attribute("data-id") for item in page.all("#tree > ul > li")} == {
        f"adapter:{one.digest}",
        f"adapter:{other.digest}",
    }
    assert page.text(".details [data-fact=digest]") == one.digest  # the one that is meant is open

    search(page, keys[1])
    page.find(f"#tree > ul > {row(keys[1])}")
    assert page.text(".details [data-fact=continues]") == keys[0]
    opened(page, keys[1])
    assert page.all(f"{row(keys[1])} {row(keys[2])}")

    search(page, one.digest)
    page.find(f"#tree > ul > {row(f'adapter:{one.digest}')}")

    search(page, "find-model")
    page.says("#model-held", "cpu: 5 objects")
    page.find("#tree > ul > li[data-kind=space]")

    search(page, "nobody")
    page.says("#search-note", "Nothing here is called nobody")
    page.click("#search-clear")
    page.find(row("base"))


def test_names_are_text_whatever_stands_in_them(page: Any, client: CacheClient, kv: Chain, adapter: Adapter) -> None:
    evil = "<img src=x onerror=\"document.title='gone'\"><script>document.title='gone'</script>"
    made = adapter("a@b:onerror=1".replace("=", "+") + "/-//x")
    kv(1, made.digest, evil)
    kv(1, model=evil)
    page.open(width=360)
    assert page.text(f"{row(f'adapter:{made.digest}')} .name").startswith("a@b:onerror+1/-//x")
    opened(page, "base")
    names = [page.script("return arguments[0].textContent", item) for item in page.all("li[data-kind=space] .name")]
    assert any(name.startswith(evil) for name in names)
    page.allowed = ["/v1/lookup - Failed to load resource"]
    search(page, evil)
    page.find("#tree > ul > li[data-kind=space]")
    page.says("#model-held", evil)
    assert page.script("return [document.images.length, document.scripts.length, document.title]") == [
        0,
        1,
        "LoRACache",
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1440])
def test_nothing_overflows_and_fingers_find_the_buttons(
    page: Any, kv: Chain, adapter: Adapter, width: int, scheme: str
) -> None:
    made = adapter("a-name-without-any-place-to-break-it-" + "x" * 150)
    keys = kv(14, made.digest, "m" * 200)
    page.open(width=width, scheme=scheme)
    opened(page, f"adapter:{made.digest}")
    page.click("li[data-kind=space] .toggle")
    opened(page, keys[0])
    for open_details in (f"{row(f'adapter:{made.digest}')} > .row .name", f"{row(keys[9])} .name"):
        page.click(open_details)
        page.find(".details")
        assert page.script("return document.documentElement.scrollWidth") <= width
    low = page.script(
        "return [...document.querySelectorAll('button, select, input')].filter((each) => each.checkVisibility())"
        ".map((each) => [each.textContent, each.getBoundingClientRect().height])"
        ".filter(([, height]) => height < arguments[0])",
        40 if width == 360 else 18,
    )
    assert low == []
    page.click(".details [data-verb=move]")
    page.says(".about", "Now there")
    box = page.script("const b = document.querySelector('#action').getBoundingClientRect(); return [b.left, b.right]")
    assert 0 <= box[0] < box[1] <= width


def contrast(one: list[int], other: list[int]) -> float:
    def light(color: list[int]) -> float:
        parts = [part / 255 for part in color]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(page: Any, scheme: str) -> None:
    page.open(scheme=scheme)
    colors = page.script(
        "const s = getComputedStyle(document.documentElement); return Object.fromEntries(arguments[0].map((name) => "
        "[name, s.getPropertyValue(`--${name}`).trim().slice(1).match(/../g).map((part) => parseInt(part, 16))]))",
        [
            "page",
            "panel",
            "sunken",
            "text",
            "dim",
            "accent",
            "on-accent",
            "good",
            "bad",
            "warn",
            "cpu",
            "disk",
            "redis",
        ],
    )
    for behind in ("page", "panel", "sunken"):
        for text in ("text", "dim", "accent", "good", "bad", "warn"):
            assert contrast(colors[text], colors[behind]) >= 4.5, (text, behind)
    assert contrast(colors["on-accent"], colors["accent"]) >= 4.5
    for line in ("cpu", "disk", "redis"):
        assert contrast(colors[line], colors["panel"]) >= 3, line


def in_page(page: Any, code: str, *arguments: Any) -> Any:
    """What `code` answers, with the page's own modules: `await part("history")`."""
    return page.driver.execute_async_script(
        "const [...given] = arguments; const done = given.pop(); const part = (name) => import(`/assets/${name}.js`);"
        f"(async () => {{ {code} }})().then(done, (error) => done(String(error)))",
        *arguments,
    )


def test_a_tier_that_is_not_in_use_or_scanned_is_said_to_be(page: Any, anybody: httpx.Client) -> None:
    page.open()
    stats = anybody.get("/v1/stats").json()
    stats["tiers"]["redis"]["available"] = False
    stats["tiers"]["disk"]["scanned"] = False
    shown = in_page(
        page,
        "(await part('overview')).show(given[0], performance.now());"
        "const badge = (tier) => document.querySelector(`[data-tier=${tier}] .badge`).textContent;"
        "return ['cpu', 'disk', 'redis'].map(badge)",
        stats,
    )
    assert shown == ["available", "being scanned", "not in use"]


def test_hours_of_statistics_keep_fifteen_minutes_and_a_restart_is_a_gap(page: Any) -> None:
    page.open()
    code = """
        const { History } = await part("history");
        const history = new History();
        const at = (second, count, uptime = second) => history.add({ uptime_s: uptime, hits: { cpu: count },
            misses: { absent: count }, counters: { "store.bytes": count * 10 } }, second * 1000);
        for (let second = 0; second <= 10000; second += 2) at(second, second);
        const kept = history.rateOf("store.bytes");
        const long = [kept.length, kept[0][1], history.hitRate().at(-1)[1], history.span(1e7)];
        at(10002, 5, 1);
        at(10004, 7, 3);
        const rates = history.rateOf("store.bytes").slice(-3).map(([, value]) => value);
        return [long, rates, history.looked(10004000, 2000)];
    """
    assert in_page(page, code) == [[451, 10, 0.5, 900_000], [10, None, 10], {"hits": 2, "misses": 2}]


def test_numbers_are_read_with_their_units(page: Any) -> None:
    page.open()
    code = """
        const f = await part("format");
        return [f.bytes(0), f.bytes(1000), f.bytes(1024), f.bytes(1.5 * 2 ** 30), f.bytes(2 ** 40 - 1), f.count(999999),
            f.count(1234567), f.percent(0), f.percent(1), f.percent(0.99999), f.duration(0), f.duration(3700)];
    """
    assert in_page(page, code) == [
        "0 B", "1000 B", "1.00 KiB", "1.50 GiB", "1.00 TiB", "999,999", "1.23 M", "0 %", "100 %", "99.9 %", "0 s",
        "1 h 1 min",
    ]  # fmt: skip


def test_it_says_that_the_daemon_is_gone_and_comes_back_with_it(
    page_of: Any, daemon: Any, rest_is_up: Any, eventually: Any
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first = daemon(http=f"127.0.0.1:{port}")
    eventually(lambda: rest_is_up(first))
    page = page_of(first.http)
    page.allowed = ["ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_CONNECTION_RESET"]
    page.open()
    first.stop(signal.SIGKILL)
    page.says("#state", "daemon gone, retrying")
    page.says("#banner", "No answer since")
    assert "stale" in page.find("#main").get_attribute("class")
    again = daemon(http=f"127.0.0.1:{port}", socket=first.socket)
    eventually(lambda: rest_is_up(again))
    page.says("#state", "connected")
    assert not page.find("#banner").is_displayed()
    page.wait(lambda: page.text("#events-note").startswith("live"), "events come again")
    with again.client() as client:
        page.wait(lambda: page.text("#connections") == str(client.status()["connections"]), "the number of clients")
