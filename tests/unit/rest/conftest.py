# SPDX-License-Identifier: Apache-2.0
"""Daemons with a REST port, and a browser that looks at their dashboard."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from loracache import CacheClient, Namespace

_WAIT_S = 20.0


def up(running: Any) -> bool:
    try:
        return httpx.get(f"{running.http}/readyz").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="session")
def rest_is_up() -> Callable[[Any], bool]:
    return up


@pytest.fixture(scope="module")
def running(module_daemon: Any, eventually: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    disk = tmp_path_factory.mktemp("disk")
    made = module_daemon(http="127.0.0.1:0", memory="16MiB", page_size="4KiB", disk_path=disk, disk="64MiB")
    made.disk = disk
    eventually(lambda: up(made), "REST answers")
    return made


@pytest.fixture
def client(running: Any) -> Iterator[CacheClient]:
    """At the socket."""
    with CacheClient(running.url) as made:
        yield made


@pytest.fixture
def anybody(running: Any) -> Iterator[httpx.Client]:
    """Over HTTP, without a token."""
    with httpx.Client(base_url=running.http) as made:
        yield made


@pytest.fixture
def operator(running: Any) -> Iterator[httpx.Client]:
    """Over HTTP, with the daemon's token."""
    token = Path(f"{running.socket}.token").read_text().strip()
    with httpx.Client(base_url=running.http, headers={"authorization": f"Bearer {token}"}) as made:
        yield made


@pytest.fixture
def chain(client: CacheClient) -> Callable[[int], list[str]]:
    """chain(count): hex keys of a new chain of objects of 1,000 bytes."""

    def store(count: int) -> list[str]:
        root, keys = (
            client.register(Namespace("model", "float32", "layout", 16)),
            [os.urandom(32) for _ in range(count)],
        )
        with client.reserve(root, keys, [1000] * count) as reservation:
            for position in range(count):
                reservation.write(position, bytes(1000))
        assert reservation.causes == [""] * count
        return [key.hex() for key in keys]

    return store


@pytest.fixture
def adapter(client: CacheClient, tmp_path: Path) -> Callable[[str], SimpleNamespace]:
    """adapter(name): one with content of its own is in the cache."""

    def add(name: str) -> SimpleNamespace:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
        tensors = {
            f"base_model.model.q_proj.lora_{part}.weight": np.random.default_rng().standard_normal(shape, np.float32)
            for part, shape in (("A", (4, 64)), ("B", (64, 4)))
        }
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        return SimpleNamespace(name=name, digest=client.add_adapter(str(tmp_path), name))

    return add


class Page:
    """The dashboard of the daemon at `url` in a real browser. `allowed`: words in console errors that a test expects;
    any other error, and any request to another place, fails it.
    """

    def __init__(self, driver: Chrome, url: str) -> None:
        self.driver = driver
        self.url = url
        self.allowed: list[str] = []
        self._requests: list[tuple[str, str]] = []

    def open(self, token: str = "", width: int = 1440, scheme: str = "light") -> None:
        """As somebody who comes for the first time, or with a token."""
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        wish = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wish})
        self.driver.get(f"{self.url}/")
        self.script("sessionStorage.clear(); if (arguments[0]) sessionStorage['loracache.token'] = arguments[0]", token)
        self.driver.refresh()
        self.wait(lambda: self.text("#state") == "connected" and self.all("#tree li"), "it is connected")

    def script(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def all(self, css: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def find(self, css: str) -> WebElement:
        found: list[WebElement] = self.wait(lambda: self.all(css), f"{css} is there")
        return found[0]

    def text(self, css: str) -> str:
        """Without waiting and in one step: the page may write it again at any time."""
        return str(self.script("return document.querySelector(arguments[0])?.textContent ?? ''", css))

    def title(self, css: str) -> str:
        return str(self.script("return document.querySelector(arguments[0])?.title ?? ''", css))

    def click(self, css: str) -> None:
        self.find(css)
        self.script("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", css)
        self.wait(lambda: self._clicked(css), f"{css} is clicked")

    def _clicked(self, css: str) -> bool:
        """False where the page wrote the element again between looking for it and the click."""
        try:
            self.find(css).click()
        except StaleElementReferenceException:
            return False
        return True

    def wait(self, holds: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + _WAIT_S
        while not (found := holds()):
            assert time.monotonic() < deadline, f"not within {_WAIT_S} s: {what}\n{self.text('main')[:3000]}"
            time.sleep(0.05)
        return found

    def says(self, css: str, words: str) -> None:
        self.wait(lambda: words in self.text(css), f"{css} says {words!r}, not {self.text(css)!r}")

    def requests(self) -> list[tuple[str, str]]:
        """(method, path) of every request so far."""
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] != "Network.requestWillBeSent":
                continue
            request = message["params"]["request"]
            if message["params"]["documentURL"].startswith(self.url):  # and not the browser's own first page
                self._requests.append((request["method"], request["url"]))
        return [(method, where.removeprefix(self.url)) for method, where in self._requests]

    def changes(self) -> list[str]:
        """Paths of the requests that could have changed something."""
        return [path for method, path in self.requests() if method != "GET" and path != "/v1/lookup"]

    def check(self) -> None:
        elsewhere = [path for _, path in self.requests() if not path.startswith(("/", "data:"))]
        assert not elsewhere
        said = [entry["message"] for entry in self.driver.get_log("browser")]
        assert not [line for line in said if not any(word in line for word in self.allowed)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """A headless Chromium. It is never skipped: scripts/test.sh installs it."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    assert chromium, "install the package chromium"
    assert chromedriver, "install the package chromium-driver"
    options = ChromeOptions()
    options.binary_location = chromium
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
    for flag in (*flags, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(chromedriver))
    driver.set_page_load_timeout(_WAIT_S)
    driver.set_script_timeout(_WAIT_S)
    yield driver
    driver.quit()


@pytest.fixture
def page_of(browser: Chrome) -> Iterator[Callable[[str], Page]]:
    """page_of(url): a daemon's dashboard, not yet opened."""
    pages: list[Page] = []

    def make(url: str) -> Page:
        pages.append(Page(browser, url))
        return pages[-1]

    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what an earlier test left
    yield make
    for page in pages:
        page.check()
    if pages:
        browser.execute_script("sessionStorage.clear()")  # the next test's page begins without a token
    browser.get("about:blank")  # so that nothing polls a daemon that ends


@pytest.fixture
def page(running: Any, page_of: Callable[[str], Page]) -> Page:
    """The dashboard of the module's daemon, not yet opened."""
    return page_of(running.http)


@pytest.fixture
def token(running: Any) -> str:
    """The daemon's own."""
    return Path(f"{running.socket}.token").read_text().strip()


@pytest.fixture
def kv(client: CacheClient) -> Callable[..., list[str]]:
    """kv(count, adapter="", model="model"): hex keys of a new chain of objects of 1,000 bytes that depends on it."""

    def store(count: int, adapter: str = "", model: str = "model", size: int = 1000) -> list[str]:
        root = client.register(Namespace(model, "float16", "layout", 16, adapter), [model])
        keys = [os.urandom(32) for _ in range(count)]
        parents = [bytes.fromhex(adapter), *keys[:-1]]
        with client.reserve(root, keys, [size] * count, parents=parents) as reservation:
            for position in range(count):
                reservation.write(position, bytes(size))
        assert reservation.causes == [""] * count
        return [key.hex() for key in keys]

    return store
