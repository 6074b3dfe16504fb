# SPDX-License-Identifier: Apache-2.0
"""The plugin on releases of vLLM that it knows, does not know, and that are not what it thinks they are."""

from __future__ import annotations

import importlib
import importlib.machinery
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loracache.connectors.vllm import plugin
from loracache.connectors.vllm.common import patches, releases
from loracache.connectors.vllm.connector import LoRACacheConnector
from loracache.connectors.vllm.lora.refusals import Refusal
from loracache.errors import ConfigError

OURS = SimpleNamespace(
    kv_transfer_config=SimpleNamespace(
        kv_connector="LoRACacheConnector", kv_connector_extra_config={"server": "unix:///s", "lora_pool": "1GiB"}
    )
)
STOCK = SimpleNamespace(kv_transfer_config=None)
NEVER, NOT_NOW = Refusal("rank 512 is over it", forever=True), Refusal("no tier has it", forever=False)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not loaded the plugin."""
    monkeypatch.setattr(patches, "_begun", False)
    monkeypatch.setattr(patches, "problems", [])
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda version: monkeypatch.setattr("vllm.version.__version__", version)


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str, str], Any]]:
    """patched(name, source): the module of vLLM with this source, imported after the plugin was loaded."""
    monkeypatch.syspath_prepend(tmp_path)
    name = "module_of_another_vllm"
    monkeypatch.delitem(sys.modules, name, raising=False)

    def make(patch: str, source: str) -> Any:
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        sys.meta_path.insert(0, patches.Patcher({name: getattr(plugin, patch)}))
        return importlib.import_module(name)

    yield make
    sys.modules.pop(name, None)


class Connector:
    def __init__(self) -> None:
        self.fail: Any = None

    def fail_requests_through(self, fail: Callable[[str, Refusal], None]) -> None:
        self.fail = fail


class SchedulerOf032:
    def __init__(self, connector: Any = None) -> None:
        self.grammar_compile_error_reqs: Any = set()
        self.connector = connector
        self.vllm_config: Any = STOCK

    def update_from_output(self) -> Any:
        failed = set(self.grammar_compile_error_reqs)
        self.grammar_compile_error_reqs.clear()
        outputs = [SimpleNamespace(request_id=each, finish_reason="error", stop_reason=None) for each in failed]
        other = SimpleNamespace(request_id="other", finish_reason=None, stop_reason=None)
        return {0: SimpleNamespace(outputs=[*outputs, other])}

    def step(self) -> Any:
        """Request -> why it was ended."""
        outputs = self.update_from_output()[0].outputs
        return {each.request_id: each.stop_reason for each in outputs if each.finish_reason}


class SchedulerOf033(SchedulerOf032):
    def __init__(self, connector: Any = None) -> None:
        super().__init__(connector)
        self.grammar_compile_error_reqs = {}

    def step(self) -> Any:
        """Request -> the error it was ended with."""
        failed, self.grammar_compile_error_reqs = self.grammar_compile_error_reqs, {}
        return failed


def scheduler(kind: type, connector: Any = None) -> Any:
    """One of this kind, made after the plugin has patched it."""
    module = SimpleNamespace(__name__="scheduler", Scheduler=type("Scheduler", (kind,), {}))
    plugin._patch_scheduler(module)
    return module.Scheduler(connector)


@pytest.mark.parametrize("kind", [SchedulerOf032, SchedulerOf033])
def test_requests_are_ended_in_every_step_whatever_vllm_keeps_them_in(kind: type) -> None:
    connectors = [Connector(), Connector()]
    for inner in (connectors[0], SimpleNamespace(_connectors=[object(), connectors[1]])):
        made = scheduler(kind, inner)
        fail = connectors[inner is not connectors[0]].fail
        for step in ("a", "b", "c"):  # what they are kept in is another one each step on 0.33
            fail(step, NEVER)
            assert list(made.step()) == [step]
            assert not made.step()


def test_up_to_032_the_reason_is_why_the_request_stopped() -> None:
    connector = Connector()
    made = scheduler(SchedulerOf032, connector)
    for request, refusal in (("a", NEVER), ("b", NOT_NOW)):
        connector.fail(request, refusal)
    assert {name: Refusal.found_in(text) for name, text in made.step().items()} == {"a": NEVER, "b": NOT_NOW}
    made.grammar_compile_error_reqs.add("a")  # for another reason, later
    assert made.step() == {"a": None}


@pytest.mark.parametrize(("refusal", "code"), [(NEVER, "validation_error"), (NOT_NOW, "lora_adapter_error")])
def test_the_next_release_is_told_why_in_its_own_words(
    monkeypatch: pytest.MonkeyPatch, refusal: Refusal, code: str
) -> None:
    """Which it answers with 400 for the one, with 503 for the other."""
    monkeypatch.setattr("vllm.outputs.RequestError", SimpleNamespace, raising=False)
    connector = Connector()
    made = scheduler(SchedulerOf033, connector)
    connector.fail("a", refusal)
    error = made.step()["a"]
    assert (error.code, error.message, error.retryable) == (code, str(refusal), not refusal.forever)


@pytest.mark.parametrize("connector", [None, object(), Connector()])
def test_a_scheduler_that_ends_requests_otherwise_starts_all_the_same(connector: Any) -> None:
    class Scheduler(SchedulerOf032):
        def __init__(self, connector: Any) -> None:
            self.connector = connector
            self.vllm_config = STOCK

    scheduler(Scheduler, connector)
    assert getattr(connector, "fail", None) is None


def test_and_with_a_pool_it_is_refused() -> None:
    class Scheduler(SchedulerOf032):
        def __init__(self, connector: Any) -> None:
            self.connector = connector
            self.vllm_config = OURS

    with pytest.raises(ConfigError, match=r"lora_pool.*grammar_compile_error_reqs.*leave lora_pool out"):
        scheduler(Scheduler, Connector())


@pytest.mark.parametrize("patch", ["_patch_worker", "_patch_scheduler", "_patch_input", "_patch_front_end"])
def test_a_module_that_is_not_what_we_know_is_left_as_it_is(
    patched: Any, patch: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "loracache"):
        module = patched(patch, "kept = object()\n")
    assert {name for name in vars(module) if not name.startswith("__")} == {"kept"}
    (record,) = caplog.records
    assert "module_of_another_vllm" in record.getMessage()
    patches._begun = True
    assert "module_of_another_vllm" in patches.problem()


def test_a_module_whose_loader_cannot_be_told_is_imported_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loader:
        __slots__ = ()

        def create_module(self, spec: Any) -> None:
            return None

        def exec_module(self, module: Any) -> None:
            module.kept = True

    class Finder:
        @staticmethod
        def find_spec(name: str, path: Any, target: Any = None) -> Any:
            loader: Any = Loader()
            return importlib.machinery.ModuleSpec(name, loader) if name == "frozen_module" else None

    sys.meta_path.insert(0, Finder)
    sys.meta_path.insert(0, patches.Patcher({"frozen_module": plugin._patch_worker}))
    try:
        assert importlib.import_module("frozen_module").kept
    finally:
        sys.modules.pop("frozen_module", None)
    patches._begun = True
    assert "frozen_module" in patches.problem()


def test_engines_that_ask_for_nothing_get_vllms_own_managers_whatever_their_configuration(patched: Any) -> None:
    worker = patched("_patch_worker", "class LRUCacheWorkerLoRAManager:\n    def __init__(self, *args): pass\n")
    for config in (STOCK, None, object(), SimpleNamespace(kv_transfer_config=object())):
        assert type(worker.LRUCacheWorkerLoRAManager(config)).__module__ == worker.__name__


def test_a_front_end_that_is_not_what_we_know_starts_unless_it_has_a_pool(
    patched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = patched(
        "_patch_front_end", "class OpenAIServingModels:\n    def __init__(self, client): self.engine_client = client\n"
    )
    front.OpenAIServingModels(object())
    front.OpenAIServingModels(SimpleNamespace(vllm_config=STOCK))
    with pytest.raises(ConfigError, match=r"lora_pool is set, but does not fit.*resolve_lora"):
        front.OpenAIServingModels(SimpleNamespace(vllm_config=OURS))


@pytest.mark.parametrize("version", ["0.26.0", "0.29.1", "0.32.0+cpu", "0.33.0", "0.33.1.dev7+gabc"])
def test_known_releases_are_patched(release: Any, version: str, caplog: pytest.LogCaptureFixture) -> None:
    release(version)
    before = len(sys.meta_path)
    plugin.register()
    plugin.register()
    assert len(sys.meta_path) == before + 1
    assert patches.problem() == ""
    assert not caplog.records


@pytest.mark.parametrize("version", ["0.25.3", "0.34.0", "1.0.0", "0.34.0.dev1", "dev", ""])
def test_unknown_releases_are_left_alone_with_one_warning(
    release: Any, version: str, caplog: pytest.LogCaptureFixture
) -> None:
    release(version)
    before = list(sys.meta_path)
    plugin.register()
    plugin.register()
    assert sys.meta_path == before
    (record,) = caplog.records
    assert (record.levelname, version in record.getMessage()) == ("WARNING", True)
    assert "0.26 to 0.33" in patches.problem()


def make_connector(extra: dict[str, Any]) -> None:
    """Our connector; what it does after it has looked at its release needs an engine."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    transfer = SimpleNamespace(kv_connector_extra_config=extra, kv_load_failure_policy="recompute")
    config: Any = SimpleNamespace(kv_transfer_config=transfer, parallel_config=SimpleNamespace(nnodes=1))
    with pytest.raises(AttributeError, match="engine_id"):
        LoRACacheConnector(config, KVConnectorRole.SCHEDULER, SimpleNamespace(kv_cache_groups=[]))


def test_the_connector_caches_kv_of_an_unknown_release_and_says_so_once(
    release: Any, caplog: pytest.LogCaptureFixture
) -> None:
    release("0.99.0")
    plugin.register()
    caplog.clear()
    make_connector({})
    (record,) = [each for each in caplog.records if each.name.startswith("loracache")]
    assert "0.99.0" in record.getMessage()


def test_a_pool_is_refused_where_the_plugin_is_not_at_work(release: Any) -> None:
    with pytest.raises(ConfigError, match="vLLM did not load the plugin 'loracache'"):
        make_connector({"lora_pool": "1GiB"})
    release("0.99.0")
    plugin.register()
    with pytest.raises(ConfigError, match=r"lora_pool is set, but vLLM 0\.99\.0 is none.*leave lora_pool out"):
        make_connector({"lora_pool": "1GiB"})


def test_a_vllm_without_a_version_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.version", None)
    assert releases.vllm_version() == "unknown"
    assert releases.unknown_release()
