# SPDX-License-Identifier: Apache-2.0
"""`load_inplace` is carried out once, and the scheduler's side of our connector hears of it."""

from __future__ import annotations

import asyncio
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.v1.engine import core

from loracache.connectors.vllm.frontend.reload import forget_orders, tell_of_reloads


class Models:
    """The part of vLLM's OpenAIServingModels that is patched."""

    def __init__(self) -> None:
        self.lora_requests: dict[str, LoRARequest] = {}

    async def load_lora_adapter(self, request: Any, base_model_name: str | None = None) -> str:
        """What vLLM's does."""
        await asyncio.sleep(0)
        if request.lora_path == "bad":
            return "error"
        self.lora_requests[request.lora_name] = LoRARequest(
            request.lora_name, 7, request.lora_path, base_model_name, request.load_inplace
        )
        return "loaded"


@pytest.mark.parametrize("inplace", [True, False])
def test_the_front_end_remembers_the_adapter_and_not_the_order(inplace: bool) -> None:
    models = Models()
    forget_orders(models)
    request = SimpleNamespace(lora_name="one", lora_path="/x", load_inplace=inplace)
    assert asyncio.run(models.load_lora_adapter(request, base_model_name="base")) == "loaded"
    known = models.lora_requests["one"]
    assert (known.lora_int_id, known.lora_path, known.base_model_name) == (7, "/x", "base")
    assert known.load_inplace is False
    failing = SimpleNamespace(lora_name="two", lora_path="bad", load_inplace=True)
    assert asyncio.run(models.load_lora_adapter(failing)) == "error"
    assert set(models.lora_requests) == {"one"}


class Connector:
    def __init__(self) -> None:
        self.told: list[int] = []

    def adapter_reloaded(self, lora_request: LoRARequest) -> None:
        self.told.append(lora_request.lora_int_id)


def test_the_connector_is_told_of_what_was_loaded_in_place_alone_and_inside_another() -> None:
    ours, inner = Connector(), Connector()

    class EngineCore:
        scheduler: Any = None

        def add_lora(self, lora_request: LoRARequest) -> bool:
            if lora_request.lora_path == "/bad":
                raise ValueError("no such adapter")
            return True

    tell_of_reloads(SimpleNamespace(EngineCore=EngineCore))
    assert EngineCore().add_lora(LoRARequest("one", 1, "/x", load_inplace=True)) is True
    for connector in (None, object(), ours, SimpleNamespace(_connectors=[object(), inner])):
        engine = EngineCore()
        engine.scheduler = SimpleNamespace(connector=connector)
        assert engine.add_lora(LoRARequest("one", 1, "/x", load_inplace=True)) is True
        assert engine.add_lora(LoRARequest("one", 2, "/x")) is True
        with pytest.raises(ValueError, match="no such adapter"):
            engine.add_lora(LoRARequest("one", 3, "/bad", load_inplace=True))
    assert ours.told == inner.told == [1]


def test_vllms_own_method_keeps_its_signature() -> None:
    """vLLM reads the types of a message's arguments from it."""
    module = SimpleNamespace(EngineCore=type("EngineCore", (), {"add_lora": core.EngineCore.add_lora}))
    before = inspect.signature(module.EngineCore.add_lora)
    tell_of_reloads(module)
    assert inspect.signature(module.EngineCore.add_lora) == before


def test_both_sides_of_the_scheduler_forget_what_the_id_was(driver: Any, make_request: Any, tmp_path: Any) -> None:
    driver.link.digests[str(tmp_path)] = "a" * 64
    adapter = LoRARequest("one", 1, str(tmp_path))
    first = driver.keys(make_request("a", 64, lora_request=adapter))
    driver.link.digests[str(tmp_path)] = "b" * 64
    assert driver.keys(make_request("a", 64, lora_request=adapter)) == first
    driver.side.adapter_reloaded(adapter)
    assert driver.keys(make_request("a", 64, lora_request=adapter)) != first
