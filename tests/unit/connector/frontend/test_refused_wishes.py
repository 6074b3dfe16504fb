# SPDX-License-Identifier: Apache-2.0
"""What a request cannot mean is refused where vLLM checks requests, before an engine hears of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import PoolingParams, SamplingParams
from vllm.entrypoints.serve import create_error_response
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import input_processor
from vllm.v1.engine.llm_engine import LLMEngine

from loracache.connectors.vllm.frontend.wishes import refuse_wrong_wishes

ALONE = SimpleNamespace(kv_connector="LoRACacheConnector", kv_connector_extra_config={})
BESIDE = SimpleNamespace(
    kv_connector="MultiConnector",
    kv_connector_extra_config={
        "connectors": [{"kv_connector": "NixlConnector"}, {"kv_connector": "LoRACacheConnector"}]
    },
)
ANOTHERS = SimpleNamespace(kv_connector="NixlConnector", kv_connector_extra_config={})
STRANGE = object()


def processor(transfer: Any) -> Any:
    """vLLM's InputProcessor, patched, whose own work is to answer what it was given."""

    class InputProcessor(input_processor.InputProcessor):  # type: ignore[misc]
        def __init__(self) -> None:
            self.vllm_config: Any = SimpleNamespace(kv_transfer_config=transfer)

        def process_inputs(self, *args: Any, **kwargs: Any) -> Any:
            return args, kwargs

    refuse_wrong_wishes(SimpleNamespace(InputProcessor=InputProcessor))
    return InputProcessor()


def asks(params: Any) -> SamplingParams:
    return SamplingParams(extra_args=None if params is None else {"kv_transfer_params": params})


@pytest.mark.parametrize("transfer", [ALONE, BESIDE])
@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"store": "no"}, ["kv_transfer_params: store='no' must be true or false"]),
        ({"load": 0, "remote_host": "x"}, ["load=0 must be true or false"]),
        ({"pin": -5}, ["pin=-5 must be seconds, more than 0 and at most 3600"]),
        ({"returns_in": -1}, ["kv_transfer_params: returns_in=-1 must be seconds, more than 0 and at most 3600"]),
        ({"pin": "1h", "store": None}, ["pin='1h' must be seconds", "store=None must be true or false"]),
    ],
)
def test_a_wrong_wish_is_the_callers_mistake(transfer: Any, params: Any, words: list[str]) -> None:
    with pytest.raises(VLLMValidationError) as refused:
        processor(transfer).process_inputs("a", "prompt", asks(params), ())
    answer = create_error_response(refused.value).error
    assert (answer.code, [word for word in words if word not in answer.message]) == (400, [])


def test_what_looks_like_a_slip_is_refused_where_it_can_be_nobody_elses() -> None:
    with pytest.raises(VLLMValidationError, match=r"'loads' is not known; did you mean 'load'\?"):
        processor(ALONE).process_inputs("a", "prompt", asks({"loads": False}), ())
    assert processor(BESIDE).process_inputs("a", "prompt", asks({"loads": False}), ())


@pytest.mark.parametrize(
    ("transfer", "params"),
    [
        (ALONE, asks(None)),
        (ALONE, asks({})),
        (ALONE, asks({"store": False, "pin": 60})),
        (ALONE, asks({"remote_host": "of another connector", "do_remote_decode": True})),
        (ALONE, asks(["store"])),  # no mapping: vLLM's own matter
        (ALONE, PoolingParams(task="embed")),
        (ANOTHERS, asks({"store": "no"})),
        (None, asks({"store": "no"})),
        (STRANGE, asks({"store": "no"})),
    ],
)
def test_all_else_is_vllms_and_comes_to_it_as_it_was(transfer: Any, params: Any) -> None:
    given, named = processor(transfer).process_inputs("a", "prompt", params=params, supported_tasks=(), priority=3)
    assert given == ("a", "prompt", params)
    assert named == {"supported_tasks": (), "priority": 3}


def test_vllms_llm_raises_it() -> None:
    """`LLM.generate` adds its requests to an LLMEngine."""
    engine: Any = SimpleNamespace(input_processor=processor(ALONE), get_supported_tasks=lambda: ())
    with pytest.raises(VLLMValidationError, match="store='no' must be true or false"):
        LLMEngine.add_request(engine, "a", "prompt", asks({"store": "no"}))


def test_the_plugin_refuses_in_the_vllm_that_is_installed() -> None:
    from loracache.connectors.vllm import plugin

    class InputProcessor(input_processor.InputProcessor):  # type: ignore[misc]
        pass

    plugin._patch_input(SimpleNamespace(InputProcessor=InputProcessor))
    made: Any = object.__new__(InputProcessor)
    made.vllm_config = SimpleNamespace(kv_transfer_config=ALONE)
    with pytest.raises(VLLMValidationError, match="pin=-5"):
        made.process_inputs("a", "prompt", asks({"pin": -5}), supported_tasks=())
