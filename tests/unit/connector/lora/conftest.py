# SPDX-License-Identifier: Apache-2.0
"""Paged LoRA without an engine: PEFT folders made by hand, a small model's modules, and what an adapter computes."""

from __future__ import annotations

import importlib.util
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from loracache.adapters.payload import Packed, Packing
from loracache.adapters.peft import CONFIG, WEIGHTS, PeftFolder

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["*test_*.py"]

if TYPE_CHECKING:
    import torch

ALPHA = 12.0
# Module, the parts it is called in adapters, elements of a row of x, and of a row of y by part.
MODEL = [
    (f"model.layers.{layer}.{name}", tuple(f"model.layers.{layer}.{part}" for part in parts), inputs, outputs)
    for layer in range(2)
    for name, parts, inputs, outputs in (
        ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), 24, (32, 12, 12)),
        ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), 24, (40, 40)),
        ("mlp.down_proj", ("mlp.down_proj",), 40, (24,)),
    )
]
PARTS = {part: (inputs, out) for _, parts, inputs, outputs in MODEL for part, out in zip(parts, outputs, strict=True)}


@dataclass(frozen=True)
class Adapter:
    """A PEFT folder. matrices: A (rank, in) and B (out, rank) by part, as they are in the file."""

    path: str
    digest: str
    matrices: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def ranks(self) -> dict[str, int]:
        return {part: a.shape[0] for part, (a, _) in self.matrices.items()}

    def payload(self) -> bytes:
        """What the cache holds of it."""
        with PeftFolder(self.path) as folder:
            packing = Packing(folder)
            payload = bytearray(packing.size)
            assert packing.write([memoryview(payload)]) == self.digest
        return bytes(payload)

    def delta(self, part: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What it adds to the output of a part, in float64, with its weights cast to `dtype` first."""
        if part not in self.matrices:
            return x.new_zeros((len(x), PARTS[part][1])).double()
        a, b = (each.to(dtype).double() for each in self.matrices[part])
        return x.double() @ a.T @ b.T * (ALPHA / a.shape[0])


class AdapterMaker:
    """make("name", ranks=8 or {part: rank}) writes an adapter; another name has other content. folder: where, if not
    in one of its own. sizes: elements of a row of x and of y, of parts that the small model has not."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __call__(
        self,
        name: str,
        ranks: int | Mapping[str, int] = 4,
        dtype: str = "float32",
        folder: str = "",
        sizes: Mapping[str, tuple[int, int]] = PARTS,
    ) -> Adapter:
        import torch
        from safetensors.torch import save_file

        from loracache.adapters.payload import adapter_digest

        rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        by_part = dict.fromkeys(PARTS, ranks) if isinstance(ranks, int) else dict(ranks)
        matrices = {}
        for part, rank in by_part.items():
            inputs, out = sizes[part]
            a, b = torch.randn(rank, inputs, generator=rng), torch.randn(out, rank, generator=rng)
            matrices[part] = tuple((each / 4).to(getattr(torch, dtype)) for each in (a, b))
        where = self._root / (folder or name)
        where.mkdir(exist_ok=True)
        names = {part: ".lora_embedding_{}" if "embed" in part else ".lora_{}.weight" for part in by_part}
        tensors = {
            f"base_model.model.{part}{names[part].format(letter)}": each.contiguous()
            for part, pair in matrices.items()
            for letter, each in zip("AB", pair, strict=True)
        }
        save_file(tensors, where / WEIGHTS)
        config = {
            "peft_type": "LORA", "r": 1, "lora_alpha": ALPHA, "target_modules": sorted(by_part),
            "rank_pattern": by_part,
        }  # fmt: skip
        (where / CONFIG).write_text(json.dumps(config))
        return Adapter(str(where), adapter_digest(str(where)), matrices)


@pytest.fixture(scope="module")
def url(module_daemon: Any) -> str:
    return str(module_daemon(page_size="4KiB").url)


@pytest.fixture
def client(url: str) -> Iterator[Any]:
    from loracache import CacheClient

    with CacheClient(url) as made:
        yield made


@pytest.fixture
def fast_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who failed is asked again soon, by scheduler and worker."""
    from loracache.client import link as client_link
    from loracache.connectors.vllm.scheduler.lora import admission

    monkeypatch.setattr(admission, "_AGAIN_S", 0.05)
    monkeypatch.setattr(client_link, "RETRY_S", 0.05)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Torch's own threads take longer to meet than these matrices to multiply, where others use the cores too."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_adapter(tmp_path: Path) -> AdapterMaker:
    return AdapterMaker(tmp_path)


def pool_shape(pages: int = 64, **changes: Any) -> Any:
    """The small model's, float32."""
    from loracache.connectors.vllm.lora.layout import ModuleShape, PoolShape

    modules = tuple(ModuleShape(*module) for module in changes.pop("model", MODEL))
    given = {"page": 128, "chunk": 8, "element_bytes": 4, "most_rank": 16} | changes
    return PoolShape(modules, pages, **given)


@pytest.fixture(scope="session")
def make_shape() -> Callable[..., Any]:
    """make_shape(pages, page=..., chunk=..., element_bytes=..., most_rank=..., model=...)"""
    return pool_shape


class Manager:
    """What the worker's side needs of vLLM's LoRA manager: a pool, layers that are not sharded, names as PEFT has."""

    def __init__(self, shape: Any, dtype: Any = None) -> None:
        import torch

        from loracache.connectors.vllm.worker.lora.pool import PagePool

        self.pool = PagePool(shape, dtype or torch.float32, torch.device("cpu"))
        self.layers = [SimpleNamespace() for _ in shape.modules]
        self.names = None
        self.ids: dict[int, str] = {}
        self.lost = False
        self.pinned_news: dict[int, bool] = {}
        self.fetches_ahead = True

    def by_model_name(self, modules: Mapping[str, Any]) -> dict[str, Any]:
        return dict(modules)

    def evict(self, digest: str) -> None:
        self.pool.evict(digest)


@pytest.fixture(scope="session")
def make_manager() -> Callable[..., Manager]:
    return Manager


def copy_in(pool: Any, payload: Sequence[memoryview], layers: Sequence[Any]) -> Any:
    """Pages of the pool with the adapter of `payload` on them."""
    from loracache.connectors.vllm.worker.lora.filling import fill_pages

    packed = Packed(payload)
    modules = packed.modules()
    names = [part for module in pool.shape.modules for part in module.parts]
    scales = np.array([modules[part].scaling if part in modules else 0.0 for part in names], dtype=np.float32)
    resident = pool.reserve(pool.shape.place({part: each.rank for part, each in modules.items()}), scales)
    assert resident is not None
    fill_pages(pool, resident, packed, modules, layers)
    return resident


@pytest.fixture(scope="session")
def fill() -> Callable[..., Any]:
    """fill(pool, payload's buffers, layers) answers the Resident."""
    return copy_in


def computed(pool: Any, tables: Any, number: int, x: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
    """What the kernels add to the output of module `number` for rows of x whose adapters are in `slots`."""
    import torch

    import loracache.kernels.sgmv  # noqa: F401 - registers the operators
    from loracache.kernels.tables import plan_tiles

    modules = pool.shape.modules
    module, first = modules[number], sum(len(each.parts) for each in modules[:number])
    rows = slice(first, first + len(module.parts))
    order, tiles = (torch.from_numpy(each) for each in plan_tiles(np.array(slots, dtype=np.int64)))
    y = torch.zeros(len(x), sum(module.widths))
    at = (tables.page_ids, tables.places[:, rows], tables.scales[:, rows])
    shape = (list(module.widths), pool.shape.chunk, pool.shape.most_rank)
    torch.ops.loracache.lora_linear(y, x, order, tiles, pool.pages, *at, *shape)
    return y


@pytest.fixture(scope="session")
def compute() -> Callable[..., torch.Tensor]:
    """compute(pool, tables, module's number, x, slots)"""
    return computed


def is_served(pool: Any, resident: Any, adapter: Adapter) -> bool:
    """Whether all modules compute with a resident adapter what they have to."""
    import torch

    from loracache.connectors.vllm.worker.lora.pool import SlotTables

    tables = SlotTables(1, pool.shape, torch.device("cpu"))
    tables.fill(0, resident)
    for number, module in enumerate(pool.shape.modules):
        x = torch.randn(3, module.width)
        wanted = torch.cat([adapter.delta(part, x, pool.pages.dtype) for part in module.parts], dim=1)
        if not torch.allclose(computed(pool, tables, number, x, [0, 0, 0]).double(), wanted, rtol=1e-4, atol=1e-4):
            return False
    return True


@pytest.fixture(scope="session")
def serves() -> Callable[..., bool]:
    """serves(pool, resident, adapter)"""
    return is_served


# -- the scheduler's side ----------------------------------------------------------------------------------------------


class Engine:
    """AdapterAdmission in the hands of a scheduler, over workers that answer at once, or when told to (`answers`).

    Every step asks for all that wait, in order, then plans, then hears from the workers. Whatever happens: a request is
    admitted only when all workers have its adapter and were told what serves its id by an earlier plan, what runs keeps
    its adapter, and no worker is told to hold more than it has room for.
    """

    def __init__(self, url: str, shapes: Sequence[Any], patience: float) -> None:
        from loracache.connectors.vllm.common.messages import PoolFacts
        from loracache.connectors.vllm.link.scheduler import SchedulerLink
        from loracache.connectors.vllm.scheduler.lora.admission import AdapterAdmission

        self.link = SchedulerLink(url)
        self.shapes = shapes
        self.bound: dict[int, str] = {}
        self.admission = AdapterAdmission(self.link, patience, self.bound.__setitem__, True)
        self.failed: list[str] = []
        self.refusals: dict[str, Any] = {}  # the last of each request
        self.admission.fail = self._fail
        self.admission.set_pools([PoolFacts(shape, None) for shape in shapes])
        self.waiting: list[Any] = []
        self.running: dict[str, str] = {}  # request -> the digest it was admitted with
        self.answers = True
        self.orders: list[tuple[int, str, str]] = []  # all that were ever given
        self.open: dict[int, str] = {}  # those that some worker has not answered
        self.done: Counter[int] = Counter()  # by how many workers
        self.workers: list[Any] = []  # PoolWorkers, where they are not played
        self.told: dict[int, str] = {}
        self.resident: set[str] = set()
        self.costs: dict[str, list[int]] = {}

    def arrive(self, name: str, adapter: Any) -> Any:
        """A request, by its name. adapter: a LoRARequest, or None."""
        request = SimpleNamespace(request_id=name, lora_request=adapter)
        self.admission.on_new_request(request)
        self.waiting.append(request)
        return request

    def _fail(self, name: str, refusal: Any) -> None:
        self.failed.append(name)
        self.refusals[name] = refusal

    def knows(self, *adapters: Adapter) -> None:
        """What these cost, for the books that `step` keeps."""
        for each in adapters:
            self.costs[each.digest] = [shape.cost(shape.place(each.ranks).elements) for shape in self.shapes]

    def step(self) -> None:
        for request in list(self.waiting):
            if request.request_id in self.failed:
                self.waiting.remove(request)
                self.admission.end(request.request_id)
            elif self.admission.admit(request):
                self.waiting.remove(request)
                self._admitted(request)
        self._carry_out(self.admission.take_orders())
        if self.answers and self.open:
            self.report(activated={number: len(self.shapes) - self.done[number] for number in self.open})
        for worker in self.workers:
            news = worker.take_news()
            if news is not None:
                self.report(activated=news.activated, not_activated=news.not_activated)

    def report(self, **news: Any) -> None:
        """What the workers tell: see WorkerNews."""
        from loracache.connectors.vllm.common.messages import WorkerNews

        self.done.update(news.get("activated", {}))
        for number in [number for number in self.open if self.done[number] == len(self.shapes)]:
            self.resident.add(self.open.pop(number))
        for number in news.get("not_activated", {}):
            self.open.pop(number, None)
        if news.get("pools_lost"):
            self.resident.clear()
        self.admission.take_news(WorkerNews(**news))

    def end(self, name: str) -> None:
        self.running.pop(name, None)
        self.waiting = [each for each in self.waiting if each.request_id != name]
        self.admission.end(name)

    def preempt(self, name: str, adapter: Any) -> None:
        """vLLM will ask once more whether it can run."""
        del self.running[name]
        self.waiting.append(SimpleNamespace(request_id=name, lora_request=adapter))

    def runs(self, *names: str) -> bool:
        """Step, and say whether these run by now."""
        self.step()
        return set(names) <= self.running.keys()

    def _admitted(self, request: Any) -> None:
        if request.lora_request is not None:
            digest = self.told.get(request.lora_request.lora_int_id)
            assert digest is not None, "no worker knows what serves its adapter id"
            assert digest in self.resident, "its adapter is not there"
            assert digest == self.bound[request.lora_request.lora_int_id]
            self.running[request.request_id] = digest
        else:
            self.running[request.request_id] = ""

    def _carry_out(self, orders: Any) -> None:
        for digest in orders.evict:
            assert digest not in self.running.values(), "it was evicted from under a request"
            self.resident.discard(digest)
            self.open = {number: each for number, each in self.open.items() if each != digest}
        for number, digest, path in orders.load:
            assert digest not in self.resident, "it is there already"
            self.orders.append((number, digest, path))
            self.open[number] = digest
        for adapter in orders.forget:
            del self.told[adapter]
        self.told.update(orders.bind)
        for each in self.workers:
            each.carry_out(orders)
        for worker, shape in enumerate(self.shapes):
            there = [*self.resident, *self.open.values()]
            assert sum(self.costs[each][worker] for each in there if each in self.costs) <= shape.pages


@pytest.fixture
def make_engine(eventually: Any) -> Iterator[Callable[..., Engine]]:
    """make_engine(url, shape of each worker's pool, ..., patience=seconds). Connected, where the daemon is there."""
    made: list[Engine] = []

    def make(url: str, *shapes: Any, patience: float = 20.0) -> Engine:
        made.append(Engine(url, shapes or (pool_shape(400),), patience))
        if Path(url.removeprefix("unix://")).exists():
            eventually(made[-1].link.begin, "the daemon greets")
        return made[-1]

    yield make
    for engine in made:
        engine.link.close()
