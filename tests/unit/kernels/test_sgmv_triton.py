# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of segmented LoRA multiplication: natively where there is a GPU, and everywhere in Triton's
interpreter. It changes Triton for the whole process, so it gets one of its own: what runs there is `TestKernels`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from loracache.kernels import sgmv_launch
from loracache.kernels.tables import plan_tiles, tile_rows

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = ("float32", "float16", "bfloat16")
MIXED = [[8, 8, 8], [0, 0, 0], [12, 1, 0], [64, 64, 64], [1, 0, 100]]
SLOTS = np.array([3, 0, -1, 2, 2, 1, 4, 0, -1, 3, 3, 3, 4, 2, 0, 0, -1, *[0] * 20])  # 23 rows of slot 0: two tiles
LONG = 600  # rows that are cut into wide tiles


def in_turn(rows: int, slots: int) -> np.ndarray[Any, Any]:
    """Slots of rows that belong to nobody and to `slots` adapters in turn, as many as make two wide tiles of each; the
    rows behind them are nobody's. The interpreter takes a tenth of a second for a tile."""
    found = np.arange(rows) * 7 % (slots + 1) - 1
    found[70 * (slots + 1) :] = -1
    return found


@pytest.mark.skipif(INTERPRETED, reason="this is the process of their own")
@pytest.mark.timeout(400)
def test_kernels_work_where_there_is_no_gpu(alone: Callable[[str, str], None]) -> None:
    alone(f"{__file__}::TestKernels", "TRITON_INTERPRET")


def run(batch: Any, tiles_behind: int = 7, padding: int = 0, sized_for: int = 0) -> torch.Tensor:
    """y after the kernels ran. tiles_behind: unused tiles in the table; padding: rows of x and y behind the batch's,
    and as many entries of `order`.
    """
    from loracache.kernels import sgmv_triton

    weights, width = batch.weights, batch.x.shape[1:]
    order, tiles = plan_tiles(batch.slots, tile_rows(sized_for or len(batch.slots)))
    order = np.concatenate([order, np.full(padding, 1 << 30, np.int32)])
    tiles = np.concatenate([tiles, np.full((tiles_behind, 4), -1, np.int32)])
    x = torch.cat([batch.x, torch.full((padding, *width), -(1 << 40) if batch.embeds else torch.nan).to(batch.x.dtype)])
    y = torch.cat([batch.y, torch.full((padding, batch.y.shape[1]), 7).to(batch.y.dtype)]).to(DEVICE)
    tables = [torch.from_numpy(each).to(DEVICE) for each in (order, tiles)] + list(weights.tables(DEVICE))
    operator: Callable[..., None] = sgmv_triton.lora_embedding if batch.embeds else sgmv_triton.lora_linear
    columns = weights.inputs if batch.embeds else weights.widths
    torch.use_deterministic_algorithms(True)  # torch.empty, and so the scratch, is full of NaN
    try:
        operator(y, x.to(DEVICE), *tables, columns, weights.chunk, weights.most_rank, None, sized_for)
    finally:
        torch.use_deterministic_algorithms(False)
    assert (y[len(batch.slots) :] == 7).all()
    return y[: len(batch.slots)]


@pytest.fixture(params=[1, 264], ids=["whole", "split"])
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether the columns of x are split; the test runs with and without."""
    monkeypatch.setattr(sgmv_launch, "_PROGRAMS", request.param)
    sgmv_launch.launch_of.cache_clear()
    yield request.param > 1
    sgmv_launch.launch_of.cache_clear()


class TestKernels:
    __test__ = INTERPRETED or torch.cuda.is_available()

    @pytest.fixture(autouse=True)
    def ranges_of_numbers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Before 3.9 Triton's interpreter counts with arrays of one number, which NumPy 2.4 takes for none."""
        from triton.runtime import interpreter

        original = interpreter._patch_lang_tensor

        def patch(tensor: Any, *scope: Any) -> None:
            original(tensor, *scope)
            tensor.__index__ = lambda self: int(self.handle.data.item())

        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)

    @pytest.mark.parametrize(
        ("layout", "dtype"),
        [
            ("contiguous", "float32"),
            ("strided", "float32"),
            ("offset", "float32"),
            *(("scattered", each) for each in DTYPES),
        ],
    )
    def test_a_batch_of_mixed_ranks_is_what_float64_says(
        self, paged: Callable[..., Any], batch_of: Callable[..., Any], layout: str, dtype: str
    ) -> None:
        large = (layout, dtype) == ("scattered", "float32")
        ranks, slots, inputs = (MIXED, SLOTS, 192) if large else (MIXED[2:], in_turn(17, 3), 96)
        weights = paged(ranks, inputs=inputs, widths=[96, 32, 64], layout=layout, dtype=dtype)
        batch = batch_of(weights, slots, dtype=dtype)
        batch.check(run(batch))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rows", [17, LONG], ids=["narrow tiles", "wide tiles"])
    def test_an_embedding_is_what_float64_says(
        self, paged: Callable[..., Any], batch_of: Callable[..., Any], dtype: str, rows: int
    ) -> None:
        weights = paged([[8], [0], [100]], inputs=200, widths=[72], dtype=dtype)
        batch = batch_of(weights, in_turn(rows, 3), dtype=dtype, embeds=True)
        batch.check(run(batch))

    @pytest.mark.parametrize("rows", [7, LONG], ids=["narrow tiles", "wide tiles"])
    def test_ranks_may_be_as_high_as_peft_s_adapters_have_them(
        self, paged: Callable[..., Any], batch_of: Callable[..., Any], rows: int
    ) -> None:
        weights = paged([[320, 8], [8, 512]], inputs=96, widths=[64, 32])
        batch = batch_of(weights, in_turn(rows, 2))
        batch.check(run(batch))

    @pytest.mark.parametrize("page_elements", [32, 160])
    @pytest.mark.parametrize("rows", [17, LONG], ids=["narrow tiles", "wide tiles"])
    def test_pages_may_be_shorter_or_longer_than_rows(
        self, paged: Callable[..., Any], batch_of: Callable[..., Any], splits: bool, page_elements: int, rows: int
    ) -> None:
        weights = paged(MIXED[2:], inputs=96, widths=[96, 32, 64], page_elements=page_elements)
        batch = batch_of(weights, in_turn(rows, 3))
        batch.check(run(batch))
        arguments = (rows, 3, 1000, 96, (96, 32, 64), 32, 100, 4)
        assert (sgmv_launch.launch_of(*arguments).splits > 1) == splits

    def test_widths_and_chunks_need_not_fit_blocks(
        self, paged: Callable[..., Any], batch_of: Callable[..., Any], splits: bool
    ) -> None:
        for chunk, inputs in ((16, 100), (48, 100), (32, 7)):
            weights = paged([[8, 0, 17]], inputs=inputs, widths=[40, 33, 1], chunk=chunk, page_elements=7 * chunk)
            batch = batch_of(weights, np.array([0, -1, 0]))
            batch.check(run(batch))

    @pytest.mark.parametrize("rows", [17, LONG], ids=["narrow tiles", "wide tiles"])
    def test_a_program_may_take_several_blocks_of_columns(
        self, paged: Callable[..., Any], batch_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, rows: int
    ) -> None:
        monkeypatch.setattr(sgmv_launch, "_MOST_EXPANDS", 8)
        sgmv_launch.launch_of.cache_clear()
        weights = paged(MIXED[2:], inputs=64, widths=[224, 33, 64])
        batch = batch_of(weights, in_turn(rows, 3))
        batch.check(run(batch))
        sgmv_launch.launch_of.cache_clear()

    @pytest.mark.parametrize(
        ("weights_dtype", "dtype", "y_dtype"),
        [
            ("bfloat16", "float32", "float32"),
            ("float32", "bfloat16", "bfloat16"),
            ("float16", "bfloat16", "float32"),
        ],
    )
    def test_inputs_and_outputs_may_have_other_dtypes_than_weights(
        self, paged: Callable[..., Any], batch_of: Callable[..., Any], weights_dtype: str, dtype: str, y_dtype: str
    ) -> None:
        weights = paged(MIXED[2:4], inputs=96, widths=[96, 32, 64], dtype=weights_dtype)
        batch = batch_of(weights, np.array([0, -1, 1, 0]), dtype=dtype, y_dtype=y_dtype)
        batch.check(run(batch))

    @pytest.mark.parametrize("embeds", [False, True], ids=["linear", "embedding"])
    def test_a_padded_batch_leaves_the_rows_behind_it_alone(
        self, paged: Callable[..., Any], batch_of: Callable[..., Any], embeds: bool
    ) -> None:
        weights = paged([[8], [0], [64]], inputs=64, widths=[64])
        for rows, padding, tiles_behind in ((1, 0, 0), (1, 15, 100), (17, LONG, 3), (LONG, 40, 1000)):
            batch = batch_of(weights, in_turn(rows, 3) if rows > 1 else np.array([2]), embeds=embeds)
            batch.check(run(batch, tiles_behind, padding))

    @pytest.mark.parametrize("embeds", [False, True], ids=["linear", "embedding"])
    def test_a_batch_without_adapters_changes_nothing(
        self, paged: Callable[..., Any], batch_of: Callable[..., Any], embeds: bool
    ) -> None:
        from loracache.kernels import sgmv_triton

        weights = paged([[8]], inputs=64, widths=[64])
        operator: Callable[..., None] = sgmv_triton.lora_embedding if embeds else sgmv_triton.lora_linear
        columns = 64 if embeds else [64]
        order = torch.zeros(4, dtype=torch.int32, device=DEVICE)
        for rows, tiles, rank in ((4, 5, 8), (4, 0, 8), (0, 5, 8), (4, 5, 0)):
            batch = batch_of(weights, np.full(rows, -1), embeds=embeds)
            y = batch.y.to(DEVICE)
            table = torch.full((tiles, 4), -1, dtype=torch.int32, device=DEVICE)
            operator(y, batch.x.to(DEVICE), order, table, *weights.tables(DEVICE), columns, 32, rank)
            batch.check(y) if rows else None
            assert torch.equal(y.cpu(), batch.y)

    def test_another_page_id_gives_another_result(
        self, paged: Callable[..., Any], batch_of: Callable[..., Any]
    ) -> None:
        batch = batch_of(paged([[8, 0], [12, 1]], inputs=96, widths=[96, 32]), np.array([0, 1, -1]))
        batch.check(run(batch))
        batch.weights.page_ids[1, 1] = batch.weights.page_ids[1, 0]
        with pytest.raises(AssertionError, match="of the largest value"):
            batch.check(run(batch))

    def test_what_cannot_be_computed_is_refused(self, paged: Callable[..., Any], batch_of: Callable[..., Any]) -> None:
        with pytest.raises(ValueError, match="multiple of 16"):
            run(batch_of(paged([[8]], inputs=64, widths=[64], chunk=8), np.array([0])))
        with pytest.raises(TypeError, match="float64"):
            run(batch_of(paged([[8]], inputs=64, widths=[64], dtype="float64"), np.array([0])))
        batch = batch_of(paged([[8]], inputs=64, widths=[64]), np.array([0, 0]))
        batch.y = batch.y.t().contiguous().t()
        batch.x = batch.x.t().contiguous().t()
        from loracache.kernels import sgmv_triton

        tables = [torch.from_numpy(each).to(DEVICE) for each in plan_tiles(batch.slots)]
        with pytest.raises(ValueError, match="has to be contiguous"):
            sgmv_triton.lora_linear(  # type: ignore[call-arg]
                batch.y.to(DEVICE), batch.x.to(DEVICE), *tables, *batch.weights.tables(DEVICE), [64], 32, 8
            )

    @pytest.mark.parametrize("embeds", [False, True], ids=["linear", "embedding"])
    def test_a_row_is_the_same_alone_and_in_any_batch_where_it_must_be(
        self, paged: Callable[..., Any], batch_of: Callable[..., Any], embeds: bool
    ) -> None:
        """Among rows that would else make wide tiles and be summed without splits."""
        weights = paged([[8], [40]], inputs=320, widths=[96])
        slots = np.full(LONG, -1)
        slots[[3, 4, 5, 77, 300, 301, 302, 599]] = [0, 1, 0, 0, 1, 1, 1, 0]
        batch = batch_of(weights, slots, embeds=embeds)
        whole = run(batch, sized_for=sgmv_launch.INVARIANT_TOKENS)
        batch.check(whole)
        for rows in (slice(4, 5), slice(599, 600), slice(300, 302), slice(0, 100)):
            part = batch_of(weights, slots[rows], embeds=embeds)
            part.x, part.y = batch.x[rows], batch.y[rows]
            assert torch.equal(run(part, sized_for=sgmv_launch.INVARIANT_TOKENS), whole[rows])

    @pytest.mark.skipif(INTERPRETED, reason="programs run one after another there")
    def test_equal_inputs_give_equal_bits(
        self, paged: Callable[..., Any], batch_of: Callable[..., Any], splits: bool
    ) -> None:
        batch = batch_of(paged(MIXED, inputs=192, widths=[96, 32, 64], dtype="float16"), SLOTS, dtype="float16")
        assert torch.equal(run(batch), run(batch))

    @pytest.mark.skipif(INTERPRETED, reason="a graph needs a GPU")
    def test_a_graph_stays_valid_while_its_tables_change(
        self, paged: Callable[..., Any], batch_of: Callable[..., Any]
    ) -> None:
        from loracache.kernels import sgmv_triton

        weights = paged(MIXED, inputs=192, widths=[96, 32, 64])
        first, second = batch_of(weights, SLOTS, seed=1), batch_of(weights, SLOTS[::-1].copy(), seed=2)
        second.slots[:9] = -1
        order = torch.zeros(len(SLOTS), dtype=torch.int32, device=DEVICE)
        tiles = torch.zeros(30, 4, dtype=torch.int32, device=DEVICE)
        x, y, tables = torch.empty_like(first.x, device=DEVICE), first.y.to(DEVICE), weights.tables(DEVICE)

        def fill(batch: Any) -> None:
            planned, cut = map(torch.from_numpy, plan_tiles(batch.slots, tile_rows(len(batch.slots))))
            tiles.fill_(-1)
            order[: len(planned)], tiles[: len(cut)] = planned.to(DEVICE), cut.to(DEVICE)
            x.copy_(batch.x), y.copy_(batch.y)

        def call() -> None:
            sgmv_triton.lora_linear(y, x, order, tiles, *tables, weights.widths, weights.chunk, weights.most_rank)  # type: ignore[call-arg]

        fill(first)
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        for batch in (second, first):
            fill(batch)
            graph.replay()
            batch.check(y)
