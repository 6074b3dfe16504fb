# SPDX-License-Identifier: Apache-2.0
"""What Triton makes of the kernels of segmented LoRA multiplication for GPUs that need not be there: how they move
bytes, what they wait for, and how many there are. The calls are real, the launch is left out. That changes Triton for
the whole process, so it gets one of its own: what runs there is `TestCompiler` and `TestVariants`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from loracache.kernels.sgmv_launch import INVARIANT_TOKENS, launch_of, warm_sizes
from loracache.kernels.tables import PLACE_FIELDS

pytest.importorskip("triton")

COMPILING = os.environ.get("SGMV_COMPILE") == "1"


@pytest.mark.skipif(COMPILING, reason="this is the process of their own")
@pytest.mark.timeout(400)
def test_kernels_compile_where_there_is_no_gpu(alone: Callable[[str, str], None]) -> None:
    alone(__file__, "SGMV_COMPILE")


def use(capability: int, monkeypatch: pytest.MonkeyPatch, device: int = 0) -> None:
    """Have Triton take this for a GPU of that compute capability (times ten). device: its number; what was compiled for
    one is known there."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from loracache.kernels import sgmv_triton

    class GPU:
        get_current_device = staticmethod(lambda: 1000 * device + capability)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))

    driver.set_active(GPU())
    monkeypatch.setattr(sgmv_triton, "_can_overlap", lambda device: capability >= 90)


class TestCompiler:
    __test__ = COMPILING

    @pytest.fixture(params=[90])
    def compiled(
        self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[..., dict[str, str]]:
        """Calls an operator for shapes; answers the PTX of its kernels by name."""
        from triton.runtime import jit

        from loracache.kernels import sgmv_triton

        use(request.param, monkeypatch)
        found: dict[str, str] = {}
        launch = jit.JITFunction.run

        def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
            found[kernel.fn.__name__] = launch(kernel, *arguments, grid=grid, warmup=True, **named).asm["ptx"]

        monkeypatch.setattr(jit.JITFunction, "run", compile_only)

        def call(tokens: int, width: int, widths: list[int], page: int, dtype: str, embeds: bool) -> dict[str, str]:
            found.clear()
            kind = getattr(torch, dtype)
            x = torch.zeros(tokens, dtype=torch.int64) if embeds else torch.zeros(tokens, width, dtype=kind)
            tables = (
                torch.zeros(tokens, dtype=torch.int32), torch.zeros(5000, 4, dtype=torch.int32),
                torch.zeros(1, page, dtype=kind), torch.zeros(8, 64, dtype=torch.int32),
                torch.zeros(8, len(widths), PLACE_FIELDS, dtype=torch.int64), torch.zeros(8, len(widths)),
            )  # fmt: skip
            y = torch.zeros(tokens, sum(widths), dtype=kind)
            if embeds:
                sgmv_triton.lora_embedding(y, x, *tables, width, 256, 64)
            else:
                sgmv_triton.lora_linear(y, x, *tables, widths, 256, 64)
            return found

        return call

    @pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
    @pytest.mark.parametrize(
        ("tokens", "width", "widths", "page", "embeds", "dtype"),
        [
            (8, 4096, [4096, 1024, 1024], 1 << 18, False, "bfloat16"),
            (8, 4096, [4096, 1024, 1024], 1 << 18, False, "float32"),
            (600, 4096, [14336, 14336], 1 << 18, False, "bfloat16"),
            (600, 4096, [4096], 1 << 11, False, "bfloat16"),
            (8, 32000, [4096], 1 << 18, True, "bfloat16"),
        ],
        ids=["decode", "decode in float32", "prefill", "short pages", "embedding"],
    )
    def test_rows_are_read_and_written_sixteen_bytes_at_a_time(
        self, compiled: Callable[..., dict[str, str]], tokens: int, width: int, widths: list[int], page: int,
        embeds: bool, dtype: str,
    ) -> None:  # fmt: skip
        found = compiled(tokens, width, widths, page, dtype, embeds)
        assert set(found) == {"_lookup_kernel" if embeds else "_shrink_kernel", "_expand_kernel"}
        for name, ptx in found.items():
            # An embedding's columns are looked up one by one.
            narrow = re.findall(r"(?:ld|st)\.global[\w.]*\.[bu]16", ptx)
            assert not narrow or name == "_lookup_kernel", name
            assert re.search(r"(ld|st)\.global[\w.]*\.v4\.b32|cp\.async\.cg\.shared\.global.*0x10,", ptx), name

    @pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
    @pytest.mark.parametrize("compiled", [80, 90, 100], indirect=True)
    @pytest.mark.parametrize("embeds", [False, True], ids=["linear", "embedding"])
    def test_from_hopper_on_expand_starts_while_shrink_runs_and_waits_before_it_reads_what_that_wrote(
        self, compiled: Callable[..., dict[str, str]], request: pytest.FixtureRequest, embeds: bool
    ) -> None:
        found = compiled(8, 4096, [4096], 1 << 15, "bfloat16", embeds)
        expand = found.pop("_expand_kernel")
        (shrink,) = found.values()
        signals, waits = (ptx.count("griddepcontrol.") for ptx in (shrink, expand))
        if request.node.callspec.params["compiled"] < 90:
            assert signals == waits == 0
            return
        assert signals == shrink.count("griddepcontrol.launch_dependents") == 1
        assert waits == expand.count("griddepcontrol.wait") == 1
        before, _, after = expand.partition("griddepcontrol.wait")
        assert "st.global" not in before
        # A tile's three numbers, the rank, the address of B and the scale, a thread's rows, and nothing of h, y or B.
        assert len(re.findall(r"ld\.global", before)) <= 8
        assert "ld.global.v4" in after
        signal = shrink.partition("griddepcontrol.launch_dependents")[0]
        assert "ld.global" not in signal


LLAMA_8B = {  # inputs, widths: as vLLM has them
    "qkv": (4096, (4096, 1024, 1024)), "o": (4096, (4096,)), "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)), "logits": (4096, (128256,)), "embedding": (128256, (4096,)),
}  # fmt: skip
MOST_TOKENS = 8192


class TestVariants:
    __test__ = COMPILING

    @pytest.fixture
    def keys(self, monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
        """What Triton would compile; it looks a kernel up by nothing but these."""
        from triton.runtime import jit

        found: set[tuple[str, str]] = set()
        use(90, monkeypatch, device=1)
        monkeypatch.setattr(
            jit.JITFunction, "_do_compile", lambda kernel, key, *_, **__: found.add((kernel.fn.__name__, str(key)))
        )
        return found

    @staticmethod
    def calls(most_rank: int, sized_for: int = 0) -> Callable[[str, int, int], None]:
        """call(module, tokens, first slice of it among all) as the wrapper does it, on a pool's tables."""
        from loracache.kernels import sgmv_triton

        kind, slots, slices = torch.bfloat16, 16, 32 * 7 + 2
        places = torch.zeros(slots, slices, PLACE_FIELDS, dtype=torch.int64)
        scales = torch.zeros(slots, slices)
        page_ids = torch.zeros(slots, 640, dtype=torch.int32)
        pages = torch.zeros(1, 1 << 15, dtype=kind)
        buffer = torch.full((4 * (MOST_TOKENS // 16 + slots) + MOST_TOKENS,), -1, dtype=torch.int32)
        tiles, order = buffer[:-MOST_TOKENS].view(-1, 4), buffer[-MOST_TOKENS:]

        def call(module: str, tokens: int, first: int) -> None:
            inputs, widths = LLAMA_8B[module]
            there = slice(first, first + len(widths))
            tables = order, tiles, pages, page_ids, places[:, there], scales[:, there]
            y = torch.empty(tokens, sum(widths), dtype=torch.float32 if module == "logits" else kind, device="meta")
            if module == "embedding":
                ids = torch.empty(tokens, dtype=torch.int32, device="meta")
                sgmv_triton.lora_embedding(y, ids, *tables, inputs, 1024, most_rank, None, sized_for)
            else:
                x = torch.empty(tokens, inputs, dtype=kind, device="meta")
                sgmv_triton.lora_linear(y, x, *tables, widths, 1024, most_rank, None, sized_for)

        return call

    @pytest.mark.parametrize("most_rank", [16, 64, 256])
    def test_no_batch_asks_for_a_kernel_that_was_not_warmed(self, keys: set[tuple[str, str]], most_rank: int) -> None:
        call = self.calls(most_rank)
        for module in LLAMA_8B:
            for tokens in warm_sizes(MOST_TOKENS):
                call(module, tokens, 0)
        warmed = set(keys)
        assert len(warmed) == 14  # modules of equal widths share theirs
        for module, (inputs, widths) in LLAMA_8B.items():
            seen: dict[Any, int] = {}  # all that a kernel hears of a batch, but how many rows it has
            for tokens in range(1, MOST_TOKENS + 1):
                launch = launch_of(tokens, 16, 528, inputs, widths, 1024, most_rank, 2)
                seen.setdefault(dataclasses.replace(launch, tiles=0), tokens)
            assert len(seen) > 1
            for tokens in {*seen.values(), *range(1, MOST_TOKENS + 1, 113)}:
                call(module, tokens, tokens * 3 & 127)
        assert keys == warmed

    def test_an_invariant_batch_has_kernels_of_one_kind(self, keys: set[tuple[str, str]]) -> None:
        call = self.calls(64, INVARIANT_TOKENS)
        assert warm_sizes(MOST_TOKENS, INVARIANT_TOKENS) == (1,)
        for module in LLAMA_8B:
            call(module, 1, 0)
        warmed = set(keys)
        assert len(warmed) == 7
        for tokens in (2, 16, 255, 512, 513, 4095, MOST_TOKENS):
            for module in LLAMA_8B:
                call(module, tokens, 1)
        assert keys == warmed
