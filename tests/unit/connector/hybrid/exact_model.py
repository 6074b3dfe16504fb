# SPDX-License-Identifier: Apache-2.0
"""What stands in a model's place: as the KV of a token it writes a hash of all tokens before it, and reads what its
kind of layer reads. A step fails where one byte of that is not what was computed for exactly these tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

BLOCK = 16
LAYER, HEAD = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F


def kinds() -> dict[str, dict[str, Any]]:
    """For each kind of model the KV cache specs of its layers, as they describe themselves to vLLM."""
    import torch
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        FullAttentionSpec,
        MambaSpec,
        MLAAttentionSpec,
        SlidingWindowSpec,
    )

    shape: dict[str, Any] = {"block_size": BLOCK, "num_kv_heads": 2, "head_size": 8, "dtype": torch.float32}

    def full(**more: Any) -> Any:
        return FullAttentionSpec(**(shape | more))

    def window(tokens: int, **more: Any) -> Any:
        return SlidingWindowSpec(**(shape | more), sliding_window=tokens, dcp_sharded=False)

    def span(tokens: int) -> Any:
        return ChunkedLocalAttentionSpec(**shape, attention_chunk_size=tokens)

    def mla(**more: Any) -> Any:
        latent = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 24, "dtype": torch.float32}
        return MLAAttentionSpec(**(latent | more))

    def state(page: int, **more: Any) -> Any:
        shapes, dtypes = ((3, 20), (4, 8, 8)), (torch.float32, torch.float32)
        own = {"block_size": 2 * BLOCK, "page_size_padded": page, "mamba_cache_mode": "align"}
        return MambaSpec(shapes=shapes, dtypes=dtypes, **(own | more))

    double = {"block_size": 2 * BLOCK}
    page = full(**double).page_size_bytes
    return {
        "full": _named(full(), full()),
        "mla": _named(mla(), mla()),
        "window": _named(window(33), window(33)),
        "full, window": _named(window(40), window(40), window(40), full()),
        "full, two windows": _named(full(), window(24), window(72)),
        "window of one token": _named(full(), window(1)),
        "full, span": _named(span(64), span(64), full()),
        "spans across chunks": _named(span(48), span(48), full()),
        "full, state": _named(state(page), state(page), state(page), full(**double)),
        "full, states within a step": _named(
            *[state(page, num_prefill_checkpoint_blocks=1, prefill_checkpoint_alignment=1)] * 2, full(**double)
        ),
        "mla, state": _named(state(mla(**double).page_size_bytes), state(mla(**double).page_size_bytes), mla(**double)),
        "full, window, state": _named(state(page), window(40, **double), full(**double)),
        "blocks of two sizes": _named(window(40), window(40), full(head_size=16)),
        "layers of two dtypes": _named(full(), full(dtype=torch.bfloat16)),
        "heads of two numbers": _named(full(), full(num_kv_heads=1)),
        **_quantised(full, window, mla, state),
    }


def _quantised(full: Any, window: Any, mla: Any, state: Any) -> dict[str, dict[str, Any]]:
    """Kinds with fewer bytes a number, in all layers or in some."""
    import torch
    from vllm.v1.kv_cache_interface import KVQuantMode

    double = {"block_size": 2 * BLOCK}
    half = {"dtype": torch.bfloat16}
    fp8: dict[str, Any] = {"dtype": torch.uint8, "kv_quant_mode": KVQuantMode.FP8_PER_TENSOR}
    scaled: dict[str, Any] = fp8 | {"kv_quant_mode": KVQuantMode.FP8_PER_TOKEN_HEAD, "state_content_bytes": 2 * (8 + 4)}
    return {
        "fp8: full, window": _named(window(40, **fp8), window(40, **fp8), full(**fp8)),
        "fp8: mla": _named(mla(**fp8, head_size=656), mla(**fp8, head_size=656)),
        "scales in the cache: full, window": _named(window(40, **scaled), full(**scaled)),
        "scales in the cache: full, state": _named(
            state(full(**double, **scaled).page_size_bytes), full(**double, **scaled)
        ),
        "fp8 but for windows": _named(window(40, **half), full(**fp8)),
        "scales but for windows": _named(window(40, **half), window(72), full(**scaled)),
        "two dtypes and numbers of heads, windows": _named(
            window(40), window(40, **half), full(), full(num_kv_heads=1)
        ),
    }


def _named(*specs: Any) -> dict[str, Any]:
    return {f"model.layers.{number}.attn": spec for number, spec in enumerate(specs)}


def _reads(spec: Any, start: int) -> int:
    """The first token that a layer reads to compute the one at `start`, by vLLM's description of it."""
    if hasattr(spec, "sliding_window") and spec.sliding_window:
        return int(max(0, start - spec.sliding_window + 1))
    if getattr(spec, "attention_chunk_size", None):
        return int(start // spec.attention_chunk_size * spec.attention_chunk_size)
    return 0


@dataclass(frozen=True)
class Run:
    """What a step computes of a request: tokens [start, end), the last of them `drafts`. samples: a token follows."""

    request: Any
    start: int
    end: int
    drafts: tuple[int, ...] = ()
    samples: bool = True

    def tokens(self) -> list[int]:
        """All up to the end. Where an image or a video is, its content: its frames in their order."""
        found = list(self.request.all_token_ids[: self.end - len(self.drafts)]) + list(self.drafts)
        for feature in self.request.mm_features or ():
            content = sum(number * frame for number, frame in enumerate(feature.data["pixels"].data.tolist(), 1))
            first, length = feature.mm_position.offset, feature.mm_position.length
            found[first : first + length] = [content + at for at in range(length)][: max(0, len(found) - first)]
        if len(found) < self.end:  # an engine that plans ahead does not know all yet
            last = functools.reduce(following_hash, found, 1)
            while len(found) < self.end:
                found.append(_follows(np.uint64(last)))
                last = following_hash(last, found[-1])
        return found


def _follows(value: Any) -> int:
    return int(value % np.uint64(30000))


class Hashes:
    """For every token of a request a hash of it and all before it."""

    def __init__(self) -> None:
        self._of: dict[str, list[int]] = {}
        self._tokens: dict[str, list[int]] = {}

    def of(self, run: Run) -> np.ndarray[Any, Any]:
        tokens = run.tokens()
        name = run.request.request_id
        found, known = self._of.setdefault(name, []), self._tokens.setdefault(name, [])
        same = most = min(len(known), len(tokens))
        while known[:same] != tokens[:same]:  # drafts that were wrong
            same -= 1
        if same < most:
            del found[same:], known[same:]
        for token in tokens[len(known) :]:
            found.append(following_hash(found[-1] if found else 1, token))
            known.append(token)
        return np.array(found[: len(tokens)], dtype=np.uint64)


def following_hash(before: int, token: int) -> int:
    return (before * 6364136223846793005 + token * 1442695040888963407 + 7) % 2**64


class ExactModel:
    """What a worker computes with: block tables as workers keep them (they are told of new blocks, never of those that
    the scheduler took away), and the engine's memory. rank, ranks: of tensor parallelism; the KV heads of a layer
    are dealt out in their order, and where they are fewer than ranks, several have the same. heads: of layers that have
    other than as many as all ranks together hold."""

    def __init__(
        self,
        config: Any,
        tensors: dict[str, Any],
        rank: int = 0,
        ranks: int = 1,
        heads: Mapping[str, int] | None = None,
    ) -> None:
        self._groups = config.kv_cache_groups
        self._units = config.hash_block_size, config.cache_hit_alignment_tokens
        self._tensors = dict(tensors)
        self._pages = {name: self._bytes(tensor) for name, tensor in tensors.items()}
        numbers = {name: int(name.split(".")[2]) for name in tensors}
        self._marks = {name: np.uint64(numbers[name] * LAYER % 2**64) for name in tensors}
        self._rank, self._ranks, self._all_heads = rank, ranks, heads or {}
        self._hashes = Hashes()
        self.tables: dict[str, list[list[int]]] = {}

    def take(self, output: Any) -> None:
        """What a worker does with a step's plan before it computes."""
        from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace

        for new in output.scheduled_new_reqs:
            self.tables[new.req_id] = [list(blocks) for blocks in new.block_ids]
        cached = output.scheduled_cached_reqs
        for request_id, new_blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if request_id in cached.resumed_req_ids:
                self.tables[request_id] = [[] for _ in self._groups]
            for table, blocks in zip(self.tables[request_id], new_blocks or (), strict=False):
                table += blocks
        for block in output.new_block_ids_to_zero or ():
            for group in self._groups:
                if not hasattr(group.kv_cache_spec, "shapes"):
                    for name in group.layer_names:
                        self._pages[name][block] = 0
        if output.kv_cache_block_copies:
            blocks = self._pages[next(iter(self._pages))].shape[0]
            copy_kv_cache_blocks_inplace(list(self._tensors.values()), blocks, output.kv_cache_block_copies)

    def compute(self, run: Run) -> list[int]:
        """Compute a step of a request; answers the tokens that come next: right drafts, and one more."""
        name, start, end = run.request.request_id, run.start, run.end
        expected = self._hashes.of(run)
        for group, table in zip(self._groups, self.tables[name], strict=True):
            for layer in group.layer_names:
                spec = getattr(group.kv_cache_spec, "kv_cache_specs", {}).get(layer, group.kv_cache_spec)
                values = expected ^ self._marks[layer]
                where = f"{name}, tokens {start} to {end}, {layer} ({type(spec).__name__}), rank {self._rank}"
                if hasattr(spec, "shapes"):
                    self._state(self._pages[layer], spec, table, values, start, where)
                else:
                    self._attend(layer, spec, table, values, start, where)
        if not run.samples:
            return []
        found = [_follows(expected[end - len(run.drafts) - 1])]
        for at, draft in enumerate(run.drafts, end - len(run.drafts)):
            if draft != found[-1]:
                break
            found.append(_follows(expected[at]))
        return found

    def continued(self, request: Any, count: int) -> list[int]:
        """The next `count` tokens of a request."""
        known = self._hashes.of(Run(request, 0, request.num_tokens))
        found, last = [], int(known[-1])
        for _ in range(count):
            found.append(_follows(np.uint64(last)))
            last = following_hash(last, found[-1])
        return found

    def _heads(self, layer: str, count: int) -> list[int]:
        """Which of the model's a worker has; all have the one of MLA."""
        first = self._rank * self._all_heads.get(layer, count * self._ranks) // self._ranks
        return list(range(first, first + count))

    def _attend(self, layer: str, spec: Any, table: list[int], values: Any, start: int, where: str) -> None:
        pages = self._pages[layer]
        first = _reads(spec, start)
        blocks = np.array(table)
        at = np.arange(first, len(values))
        places = blocks[at // spec.block_size], slice(None), at % spec.block_size
        marks = [head * HEAD % 2**64 for head in self._heads(layer, pages.shape[1])]
        heads = np.array(marks, dtype=np.uint64)[None, :, None]
        wanted = np.broadcast_to(values[first:, None, None] ^ heads, pages[places[0], :, places[2]].shape)
        assert all(places[0]), f"{where}: reads or writes a null block, table {table}"
        held = pages[places[0], :, places[2]][: start - first]
        wrong = np.flatnonzero((held != wanted[: start - first]).any(axis=(1, 2)))
        assert not len(wrong), f"{where}: wrong KV of tokens {first + wrong[0]} to {first + wrong[-1]}, table {table}"
        pages[places[0], :, places[2]] = wanted

    def _state(self, pages: Any, spec: Any, table: list[int], values: Any, start: int, where: str) -> None:
        target = table[(len(values) - 1) // spec.block_size]
        assert target, f"{where}: writes its state to the null block, table {table}"
        if start:
            source = table[(start - 1) // spec.block_size]
            wrong = np.flatnonzero(pages[source].ravel() != values[start - 1])
            assert not len(wrong), f"{where}: wrong state of {start} tokens in block {source}, table {table}"
        if spec.num_prefill_checkpoint_blocks:
            self._state_within(pages, spec, table, values, start)
        pages[target] = values[-1]

    def _state_within(self, pages: Any, spec: Any, table: list[int], values: Any, start: int) -> None:
        """Take the state out of the middle of a step where vLLM does."""
        from vllm.model_executor.layers.mamba.checkpoint import compute_mamba_prefill_checkpoints

        unit, alignment = self._units
        (offset,), (column,) = compute_mamba_prefill_checkpoints(
            [len(values)],
            [len(values) - start],
            hash_block_size=unit,
            mamba_block_size=spec.block_size,
            checkpoint_alignment=spec.prefill_checkpoint_alignment,
            drop_eagle_block=False,
            cache_hit_alignment_tokens=alignment,
        )
        if offset and table[column]:
            pages[table[column]] = values[start + offset - 1]

    @staticmethod
    def _bytes(tensor: Any) -> Any:
        import torch

        return tensor.view(torch.uint8).numpy().view(np.uint64)
