# SPDX-License-Identifier: Apache-2.0
"""Offline batches on a real vLLM: the whole command `loracache batch run --model` beside the whole command
`vllm run-batch`, with the same model, KV cache and options, in turns.

Four batches of 2,000 requests whose prompts share beginnings, and one whose prompts share nothing: 190 M model,
bfloat16, a KV cache of about 5 % of the distinct tokens. MOONCAKE_TRACE names a trace of that format, whose hash ids
are 16 tokens each here; without it made-up conversations stand for it. And one of 10,000 on a tiny model, for what its
engine's KV cache holds at most. "walk" is what `vllm run-batch` computes of the first four where their lines are sorted
by their tokens, which is a walk down the tree of what they share. What an engine computes, and what runs together in a
step, is what vLLM logs of each of its steps. BENCH_BATCHES names those that are wanted, with commas.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from batch_sets import Item, agents, conversations, documents, few_shot, from_trace, strangers
from common import Row, model_folder, ratio_row, row, work_folder
from engine_process import environment
from make_model import PRESETS, make_model
from transformers import PreTrainedTokenizerFast

from loracache.batch.plan import make_plan
from loracache.batch.prompts import PromptHasher
from loracache.batch.replay import computed_at_least

REQUESTS, ANSWER, SEQUENCES = 2000, 4, 16
BLOCK = 32  # what vLLM's kernels for CPUs with AMX want
TRACED = 16  # tokens of a hash id
TEMPLATE = "template.jinja"
KV_SHARE = 0.05
PAIRS = 3
WARM = 64  # requests
MANY = 10_000


def _talks(seed: int) -> list[Item]:
    trace = os.environ.get("MOONCAKE_TRACE")
    if trace:
        return from_trace(Path(trace), REQUESTS, TRACED)  # the same each time
    return conversations(REQUESTS // 5, 5, seed, prompt=96, turn=(16, 96))


SETS: dict[str, Callable[[int], list[Item]]] = {
    "documents with questions": lambda seed: documents(REQUESTS // 20, 20, 256, seed, question=24),
    "few-shot evaluation": lambda seed: few_shot(REQUESTS // 50, 50, 192, seed, question=(16, 48)),
    "agents' turns": lambda seed: agents(REQUESTS // 40, 3, 4, seed, tools=96, task=64, turn=48),
    "conversations": _talks,
    "nothing shared": lambda seed: strangers(REQUESTS, 96, seed),
}
SHARING = [name for name in SETS if name != "nothing shared"]
_STEP = re.compile(
    r"Iteration\(\d+\): (\d+) context requests, (\d+) context tokens, (\d+) generation requests, "
    r"(\d+) generation tokens, iteration elapsed time: ([\d.]+) ms.* KV cache usage: ([\d.]+)%"
)


@dataclass(frozen=True, slots=True)
class Steps:
    """What an engine logged of its steps. float64 (steps, 6): requests and tokens of prompts, requests and tokens of
    answers, milliseconds, percent of the KV cache in use."""

    table: np.ndarray[tuple[int, int], np.dtype[np.float64]]

    @classmethod
    def of(cls, log: Path) -> Steps:
        """Raises ValueError where nothing is logged."""
        found = [list(map(float, each)) for each in _STEP.findall(log.read_text(errors="replace"))]
        if not found:
            raise ValueError(f"{log} has no steps: {log.read_text(errors='replace')[-3000:]}")
        return cls(np.array(found))

    @property
    def computed(self) -> float:
        """Prompt tokens."""
        return float(self.table[:, 1].sum())

    @property
    def mixed(self) -> float:
        """Of the steps that decode, the share that computes prompts, too."""
        decode = self.table[:, 2] > 0
        return float((decode & (self.table[:, 0] > 0)).sum() / decode.sum())

    @property
    def busy(self) -> float:
        """Seconds in steps."""
        return float(self.table[:, 4].sum() / 1e3)

    @property
    def taken_up_again(self) -> float:
        """Tokens beyond one a request that answers: what a preempted request has to compute anew. Its prompt shows in
        `computed`."""
        return float((self.table[:, 3] - self.table[:, 2]).sum())

    @property
    def peak(self) -> float:
        """The most of the KV cache that was in use, 1: all."""
        return float(self.table[:, 5].max() / 100)


@dataclass(frozen=True, slots=True)
class Done:
    """A command's seconds, and its engine's steps."""

    seconds: float
    steps: Steps


def run(quick: bool) -> list[Row]:
    """See the module's docstring."""
    wanted = os.environ.get("BENCH_BATCHES", ",".join([*SETS, "many", "walk"])).split(",")
    rows: list[Row] = []
    with work_folder() as folder:
        (folder / TEMPLATE).write_text("{{ messages[0]['content'] }}")
        if any(name in SETS for name in wanted):
            _warm(folder)
        for name in wanted:
            if name == "many":
                rows += _many(folder, 1000 if quick else MANY)
            elif name == "walk":
                rows += [_walk(folder, each) for each in (SHARING[:1] if quick else SHARING)]
            else:
                rows += _pairs(folder, name, 1 if quick else PAIRS)
    return rows


def _warm(folder: Path) -> None:
    """Both commands on a few requests: the first that runs fills caches, vLLM's compiled code in `folder` too."""
    model = model_folder() / "model"
    words = _words(model)
    items = _items("nothing shared", 0, words)[:WARM]
    source = folder / "warm.jsonl"
    _write_chats(source, items, words)
    _, kv, longest = _bound(items)
    for way in ("ours", "vllm"):
        _command(way, source, folder, model, kv, longest)


def _pairs(folder: Path, name: str, pairs: int) -> list[Row]:
    found: dict[str, list[Done]] = {"ours": [], "vllm": []}
    bounds, kv = [], 0
    model = model_folder() / "model"
    words = _words(model)
    for number in range(pairs):
        items = _items(name, number, words)
        source = folder / f"{number}.jsonl"
        _write_chats(source, items, words)
        bound, kv, longest = _bound(items)
        bounds.append(bound)
        for way in ("ours", "vllm") if number % 2 else ("vllm", "ours"):
            found[way].append(_command(way, source, folder, model, kv, longest))
    seconds = {way: [each.seconds for each in done] for way, done in found.items()}
    what, least = f"{name}: throughput / vllm run-batch's", 0.99 if name == "nothing shared" else 1.3
    note = f"{REQUESTS:,} requests, KV cache of {kv:,} blocks of {BLOCK} tokens"
    return [
        ratio_row(what, seconds["vllm"], seconds["ours"], at_least=least, note=note),
        *_told("  ", found["ours"], bounds, at_most=1.02),
        *_told("  vllm run-batch: ", found["vllm"], bounds, at_most=None),
    ]


def _walk(folder: Path, name: str) -> Row:
    """Prompt tokens that `vllm run-batch` computes, whose file has what shares a beginning side by side."""
    model = model_folder() / "model"
    words = _words(model)
    items = _items(name, 0, words)
    bound, kv, longest = _bound(items)
    source = folder / "walk.jsonl"
    _write_chats(source, sorted(items, key=lambda item: item[0].tolist()), words)
    computed = _command("vllm", source, folder, model, kv, longest).steps.computed / bound
    return row(f"{name}, sorted: vllm run-batch: prompt tokens computed / bound", "x", [computed])


def _items(name: str, seed: int, words: Sequence[str]) -> list[Item]:
    """A set whose tokens are numbers of words."""
    return [(tokens % len(words), ANSWER) for tokens, _ in SETS[name](seed)]


def _told(head: str, done: Sequence[Done], bounds: Sequence[int], at_most: float | None) -> list[Row]:
    """Of one way's rounds. What is left of the time at best: only the bound, at the speed its own steps had."""
    computed = [each.steps.computed / bound for each, bound in zip(done, bounds, strict=True)]
    seconds = [each.seconds for each in done]
    return [
        row(f"{head}the whole command", "s", seconds),
        row(f"{head}of that, in the engine's steps", "s", [each.steps.busy for each in done]),
        row(f"{head}prompt tokens computed / bound", "x", computed, at_most=at_most),
        row(
            f"{head}bound / tokens a second of the steps",
            "s",
            [each.steps.busy / b for each, b in zip(done, computed, strict=True)],
        ),
        row(f"{head}of the steps that decode, also compute prompts", "x", [each.steps.mixed for each in done]),
    ]


def _many(folder: Path, count: int) -> list[Row]:
    """Many short requests with answers of many lengths, through a KV cache that holds few of them."""
    chance = np.random.default_rng(7)
    items = agents(count // 40, 3, 4, 7, tools=96, task=64, turn=48)[:count]
    items = [(300 + tokens % 200, int(chance.integers(1, 32))) for tokens, _ in items]
    source, model = folder / "many.jsonl", folder / "tiny"
    make_model(model, PRESETS["tiny"])
    _write_tokens(source, items)
    bound, kv, longest = _bound(items)
    done = _command("ours", source, folder, model, kv, longest)
    what = f"{len(items):,} requests with answers of 1 to 31 tokens, {kv} blocks"
    return [
        row(f"{what}: tokens computed twice after a preemption", "", [done.steps.taken_up_again], at_most=0),
        row("  prompt tokens computed / bound", "x", [done.steps.computed / bound], at_most=1.02),
        row("  of the KV cache in use at most", "x", [done.steps.peak], at_most=1.0),
        row("  of the steps that decode, also compute prompts", "x", [done.steps.mixed]),
        row("  the whole command", "s", [done.seconds]),
    ]


def _words(model: Path) -> list[str]:
    """Those that are a token each wherever they stand, with the space before them."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    spaced = [text for text in sorted(tokenizer.get_vocab()) if text[0] == "\u0120" and text[1:].isalpha()]
    words = [f" {text[1:]}" for text in spaced]
    return [word for word in words if len(tokenizer.encode(word, add_special_tokens=False)) == 1]


def _write_chats(path: Path, items: Sequence[Item], words: Sequence[str]) -> None:
    """As chats, which vLLM's own command takes; numbers of words stand for tokens."""
    bodies = (
        {"messages": [{"role": "user", "content": "".join(map(words.__getitem__, numbers.tolist()))}], **_rest(answer)}
        for numbers, answer in items
    )
    _write(path, "/v1/chat/completions", bodies)


def _write_tokens(path: Path, items: Sequence[Item]) -> None:
    _write(path, "/v1/completions", ({"prompt": tokens.tolist(), **_rest(answer)} for tokens, answer in items))


def _rest(answer: int) -> dict[str, object]:
    return {"model": "base", "max_tokens": answer, "temperature": 0, "ignore_eos": True}


def _write(path: Path, url: str, bodies: Iterable[dict[str, object]]) -> None:
    with path.open("w") as file:
        for number, body in enumerate(bodies):
            line = {"custom_id": str(number), "method": "POST", "url": url, "body": body}
            file.write(json.dumps(line) + "\n")


def _bound(items: Sequence[Item]) -> tuple[int, int, int]:
    """(prompt tokens that a cache without end leaves to compute, blocks that are 5 % of them and have room for half of
    the sequences, tokens of the longest sequence)."""
    hasher = PromptHasher(BLOCK)
    for tokens, _ in items:
        hasher.add(tokens)
    plan = make_plan(hasher.prompts())
    bound = computed_at_least(plan.prompts, plan.tree)
    longest = max(len(tokens) + answer for tokens, answer in items)
    return bound, max(int(bound * KV_SHARE) // BLOCK, SEQUENCES // 2 * -(-longest // BLOCK)) + 1, longest


def _command(way: str, source: Path, folder: Path, model: Path, blocks: int, longest: int) -> Done:
    """Run one of the two commands over a batch, in an engine of so many blocks for sequences of at most `longest`."""
    output, log = folder / "answers.jsonl", folder / "engine.log"
    output.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    options = [
        "--served-model-name", "base", "--max-model-len", str(longest), "--max-num-seqs", str(SEQUENCES),
        "--block-size", str(BLOCK), "--num-gpu-blocks-override", str(blocks), "--enable-logging-iteration-details",
        "--chat-template", str(folder / TEMPLATE),
    ]  # fmt: skip
    scripts = Path(sys.executable).parent
    if way == "ours":
        command = [scripts / "loracache", "batch", "run", source, "-o", output, "--model", model, "--memory", "1GiB"]
        command += ["--", *options]
    else:
        command = [scripts / "vllm", "run-batch", "-i", source, "-o", output, "--model", model, *options]
    began = time.perf_counter()
    said = folder / "command.log"
    with said.open("wb") as told:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=told,
            env=environment({"TMPDIR": str(folder)}),
        )
        while way == "ours" and process.poll() is None and not log.exists():
            for own in folder.glob("loracache-batch-*/engine.log"):
                with contextlib.suppress(FileNotFoundError):
                    os.link(own, log)  # it goes with the command's folder
            time.sleep(0.1)
        status = process.wait()
    spent = time.perf_counter() - began
    if status:
        raise RuntimeError(f"{command[0]} ended with {status}: {said.read_text(errors='replace')[-3000:]}")
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    wrong = [line for line in lines if line["error"] or line["response"]["status_code"] != 200]
    if wrong or len(lines) != sum(1 for _ in source.open()):
        raise RuntimeError(f"{len(lines)} answers, {len(wrong)} of them errors: {wrong[:1]}")
    return Done(spent, Steps.of(log if way == "ours" else said))
