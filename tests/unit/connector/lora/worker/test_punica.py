# SPDX-License-Identifier: Apache-2.0
"""What a step asks of a GPU that need not be there: a device that has no memory and so answers nothing, under a mode
that looks at every operator, and kernels that only count their launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm.lora.layers import (
    LogitsProcessorWithLoRA,
    LoRAMapping,
    RowParallelLinearWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)
from vllm.lora.model_manager import AdapterLRUCache
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from loracache.connectors.vllm.worker.lora import punica
from loracache.connectors.vllm.worker.lora.manager import PagedLoRAModelManager, PagedWorkerLoRAManager
from loracache.connectors.vllm.worker.lora.pool import PagePool, SlotTables
from loracache.connectors.vllm.worker.lora.punica import PagedModule, PagedPunicaWrapper

sgmv_triton = pytest.importorskip("loracache.kernels.sgmv_triton")

DEVICE = torch.device("meta")
SLOTS, MOST_TOKENS = 4, 64


class Waits(TorchDispatchMode):  # type: ignore[misc]
    """Notes the operators that would have the host wait for the device: copies from the device, and copies to it from
    memory that is not pinned. (To read a number there fails by itself.) copies: to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: dict[int, torch.Tensor] = {}  # by address, which no other tensor may get
        self.waits: list[str] = []
        self.copies = self.fills = 0

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        found = tensor.clone()
        self.pinned[found.untyped_storage().data_ptr()] = found
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        results = [each for each in tree_leaves(found) if isinstance(each, torch.Tensor)]
        on_device = [each for each in (*tensors, *results) if each.device == DEVICE]
        in_host = [each for each in tensors if each.device != DEVICE]
        if on_device and func.overloadpacket is torch.ops.aten.fill_:
            self.fills += 1
        if on_device and "copy" in func.overloadpacket.__name__:
            self.copies += 1
            if any(each.device != DEVICE for each in results):
                self.waits.append(f"{func}: from the device")
            if any(each.untyped_storage().data_ptr() not in self.pinned for each in in_host):
                self.waits.append(f"{func}: from memory that is not pinned")
            elif in_host and not any(args[2:]) and not (kwargs or {}).get("non_blocking"):
                self.waits.append(f"{func}: blocking")
        return found


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    with Waits() as mode:
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: mode.pin(tensor))  # noqa: PLW0108 - a method
        yield mode


class Launches(list[str]):
    """Names of kernels that were launched. kinds: those that Triton compiles one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: set[tuple[Any, ...]] = set()

    def add(self, name: str, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        self.append(name)
        self.kinds.add((name, *(getattr(each, "dtype", None) for each in arguments), tuple(sorted(constants.items()))))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """The kernels that were launched; the operators go where those of a GPU do."""
    found = Launches()

    class Kernel:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *arguments, **constants: found.add(self._name, arguments, constants)

    for name in ("_shrink_kernel", "_lookup_kernel", "_expand_kernel"):
        monkeypatch.setattr(sgmv_triton, name, Kernel(name))
    for name in ("lora_linear", "lora_embedding"):
        monkeypatch.setattr(punica, name, getattr(sgmv_triton, name))
    return found


@pytest.fixture
def manager(make_shape: Callable[..., Any]) -> Any:
    """vLLM's manager on a pool that is on the device, with nothing around it."""
    made: Any = object.__new__(PagedLoRAModelManager)
    made.lora_config = SimpleNamespace(max_loras=SLOTS)
    made._making_layers = made.supports_mm = made.supports_tower_connector_lora = False
    made.ids, made.dummies, made._slot_of, made.lora_index_to_id = {}, set(), {}, [None] * SLOTS
    made._active_adapters = AdapterLRUCache(SLOTS, made._deactivate_adapter)
    made._last_mapping = made._last_slot_layout = made._classification_head = None
    made.vocab_size = 100
    made.pool = PagePool(make_shape(chunk=16), torch.float32, DEVICE)
    made.tables = SlotTables(SLOTS, made.pool.shape, DEVICE)
    wrapper = PagedPunicaWrapper(MOST_TOKENS, 8, DEVICE, lora_config=made.lora_config)
    made.punica_wrapper_mapping = {"language_model": wrapper}
    made._get_punica_wrapper = lambda name: wrapper
    made.wrapper = wrapper
    return made


@pytest.fixture
def runner(manager: Any) -> Any:
    """vLLM's runner, as far as it hands a batch's adapters over."""
    made: Any = LoRAModelRunnerMixin()
    made.lora_manager = object.__new__(PagedWorkerLoRAManager)
    made.lora_manager._adapter_manager = manager
    return made


def forward(manager: Any, tokens: int) -> None:
    """All modules, on a batch of `tokens` rows."""
    row = 0
    for shape in manager.pool.shape.modules:
        module = PagedModule(manager.pool, manager.tables, slice(row, row + len(shape.parts)), shape)
        x = torch.empty(tokens, shape.width, dtype=torch.bfloat16, device=DEVICE)
        y = torch.empty(tokens, sum(shape.widths), dtype=torch.bfloat16, device=DEVICE)
        manager.wrapper.add_lora_linear(y, x, module, module, 1.0, tuple(shape.widths))
        logits = torch.empty(tokens, sum(shape.widths), device=DEVICE)
        manager.wrapper.add_lora_logits(logits, x, module, module, 1.0)
        manager.wrapper.add_lora_embedding(y, torch.empty(tokens, dtype=torch.int32, device=DEVICE), module)
        row += len(shape.parts)


def settle(manager: Any, adapter: int, ranks: dict[str, int]) -> None:
    """An adapter becomes resident, on the other thread."""
    shape, digest = manager.pool.shape, f"digest {adapter}"
    resident = manager.pool.reserve(shape.place(ranks), np.ones(shape.slices, np.float32))
    manager.pool.want(digest)
    assert manager.pool.settle(digest, resident)
    manager.ids[adapter] = digest


def step(manager: Any, rows: list[int]) -> None:
    """What vLLM does for a batch; rows: the adapter of each, or 0."""
    manager.use(set(rows) - {0})
    manager.set_adapter_mapping(LoRAMapping(tuple(rows), tuple(rows), is_prefill=True))
    forward(manager, len(rows))


def test_a_batch_without_adapters_launches_nothing(manager: Any, launches: Launches, device: Waits) -> None:
    forward(manager, 8)  # before any batch was planned
    step(manager, [0] * 8)
    step(manager, [0] * MOST_TOKENS)
    assert launches == []
    assert device.copies == device.fills == 0
    settle(manager, 7, {"model.layers.0.mlp.down_proj": 4})
    step(manager, [0, 7, 0, 0])
    modules = len(manager.pool.shape.modules)
    assert len(launches) == 2 * 3 * modules
    launches.clear()
    device.fills = 0
    for _ in range(3):
        step(manager, [0] * 8)
    assert launches == []
    assert device.fills == 2  # the tiles of tokens and of sampled rows, once: no graph finds the batch before


@pytest.mark.parametrize("captured", [0, 2, SLOTS, SLOTS + 1])
def test_graphs_of_batches_without_adapters_have_nothing_of_ours(
    manager: Any, runner: Any, launches: Launches, device: Waits, captured: int
) -> None:
    """captured: adapters of the batch that vLLM captures a graph of, with its own dummies."""
    manager.dummies = set(range(1, SLOTS + 1))
    with runner.maybe_select_dummy_loras(manager.lora_config, np.full(8, 2, np.int32), num_active_loras=captured):
        forward(manager, 16)
    assert bool(launches) == (captured > 0)


def test_no_step_waits_for_the_device(manager: Any, launches: Launches, device: Waits) -> None:
    settle(manager, 3, {"model.layers.0.mlp.down_proj": 4, "model.layers.1.self_attn.q_proj": 8})
    settle(manager, 5, {"model.layers.1.mlp.up_proj": 16})
    device.copies, device.waits = 0, []
    for rows in ([3], [3, 0, 5, 5], [0, 0], [5] * MOST_TOKENS, [0], [3, 5]):
        step(manager, rows)
    assert device.waits == []
    assert device.copies == 2 * 3 + 2 * 4  # three tables of an adapter; a plan of tokens and one of sampled rows
    assert launches


@pytest.mark.parametrize("most_tokens", [MOST_TOKENS, 1000])
def test_no_batch_asks_for_a_kernel_that_was_not_there_at_the_start(
    manager: Any, launches: Launches, device: Waits, most_tokens: int
) -> None:
    manager.punica_wrapper_mapping = {}
    manager.wrapper = wrapper = PagedPunicaWrapper(most_tokens, 8, DEVICE, lora_config=manager.lora_config)
    manager._get_punica_wrapper = lambda name: wrapper
    manager._dtype, manager._logits_dtype, manager.modules, row = torch.bfloat16, torch.float32, {}, 0
    for shape in manager.pool.shape.modules:
        module = PagedModule(manager.pool, manager.tables, slice(row, row + len(shape.parts)), shape)
        for kind in (RowParallelLinearWithLoRA, LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA):
            layer = kind.__new__(kind)
            layer.lora_a_stacked = module
            manager.modules[f"{shape.name} {kind.__name__}"] = layer
        row += len(shape.parts)
    manager.warm()
    warmed = set(launches.kinds)
    wrapper._tokens.plan([0])
    wrapper._sampled.plan([0])
    for tokens in (1, 2, 15, 16, 17, 64, 500, 512, 513, 514, 640, 999, 1000):
        if tokens <= most_tokens:
            forward(manager, tokens)
    assert launches.kinds == warmed


@pytest.mark.parametrize(
    ("variable", "constant", "values"),
    [("VLLM_BATCH_INVARIANT", "BLOCK_M", ({16, 64}, {16})), ("VLLM_LORA_DISABLE_PDL", "OVERLAPS", ({True}, {False}))],
)
def test_vllm_s_own_switches_reach_the_kernels(
    manager: Any, launches: Launches, monkeypatch: pytest.MonkeyPatch, variable: str, constant: str, values: Any
) -> None:
    monkeypatch.setattr(sgmv_triton, "_can_overlap", lambda device: True)
    for value, wanted in zip("01", values, strict=True):
        monkeypatch.setenv(variable, value)
        manager.wrapper = PagedPunicaWrapper(1000, 8, DEVICE, lora_config=manager.lora_config)
        manager.wrapper._tokens.idle.fill_(False)
        launches.kinds.clear()
        forward(manager, 1)
        forward(manager, 1000)
        assert {dict(kind[-1])[constant] for kind in launches.kinds} == wanted


def test_what_makes_a_step_wait_is_found(device: Waits) -> None:
    target, source = torch.empty(4, device=DEVICE), torch.zeros(4)
    target.copy_(source, non_blocking=True)
    assert "not pinned" in device.waits.pop()
    target.copy_(source.pin_memory())
    assert "blocking" in device.waits.pop()
    target.copy_(source.pin_memory(), non_blocking=True)
    assert device.waits == []
    with pytest.raises((RuntimeError, NotImplementedError)):
        target[0].item()


def test_a_plan_is_what_the_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploaded, on memory that can be looked at: all tiles of a GPU, unused ones behind the used, and the rows."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    rows = punica._Rows(MOST_TOKENS, SLOTS, "cpu")
    rows._on_cpu = False
    rows.plan([2] * 40)
    assert not rows.idle.item()
    assert rows.tiles[:4].tolist() == [[2, 0, 16, 0], [2, 16, 16, 16], [2, 32, 8, 32], [-1, -1, -1, -1]]
    rows.plan([1, -1, 0, 1])
    assert rows.tiles[:3].tolist() == [[0, 0, 1, 2], [1, 1, 2, -1], [-1, -1, -1, -1]]
    assert (rows.tiles[2:, 0] == -1).all()
    assert rows.order[:3].tolist() == [2, 0, 3]
    rows.plan([-1, -1])
    assert rows.idle.item()
    assert (rows.tiles[:, 0] == -1).all()
