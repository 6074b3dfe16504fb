# SPDX-License-Identifier: Apache-2.0
"""`loracache batch plan | run`: an offline batch in the order in which what its requests share is computed once."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loracache.cli.batch_shown import print_figures, print_report, progress, report_line
from loracache.cli.common import (
    PARTLY,
    JsonOption,
    check_plot,
    engine_key,
    expanded,
    integer,
    number,
    output_is_closed,
    print_json,
)
from loracache.client.client import CacheClient
from loracache.errors import ConfigError, Unavailable

if TYPE_CHECKING:
    from loracache.batch.engine import Engine
    from loracache.batch.job import Job
    from loracache.batch.journal import Journal
    from loracache.batch.lines import BatchFile
    from loracache.batch.pins import Pins
    from loracache.batch.plan import Figures
    from loracache.batch.report import Report
    from loracache.batch.runner import Limits

__all__ = ["app"]

app = typer.Typer(help="Offline batches in OpenAI's format.", no_args_is_help=True)

_MOST_TOKENS = 1 << 40
_MEMORY = "4GiB"
_InputArgument = Annotated[str, typer.Argument(metavar="IN", help="Requests, .jsonl, gzipped or not; -: from stdin.")]


@dataclass(frozen=True, slots=True)
class Engines:
    """Options that say which engines, and what they have room for."""

    url: Annotated[
        list[str] | None,
        typer.Option(help="An OpenAI server, http://HOST:PORT/v1; again for more.", show_default=False),
    ] = None
    by: Annotated[str, typer.Option(help="tokens: of the server's tokenizer; text: faster, four bytes for each.")] = (
        "tokens"
    )
    kv_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", parser=integer(1, _MOST_TOKENS), help="KV that requests may hold.", show_default="the engine's"
        ),
    ] = None
    block_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", parser=integer(1, 4096), help="Of a block of KV.", show_default="the engine's"),
    ] = None
    running: Annotated[
        int,
        typer.Option(metavar="N", parser=integer(1, 65536), help="Requests at once on an engine.", show_default="256"),
    ] = 256
    engine_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The servers' API key [VLLM_API_KEY].", show_default=False)
    ] = None
    engine_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", parser=number, help="For one answer.", show_default="3600")
    ] = 3600.0

    def engines(self) -> list[Engine]:
        """Raises ConfigError."""
        from loracache.batch.engine import By, Engine
        from loracache.batch.http import Server

        if self.by not in [each.value for each in By]:
            raise ConfigError(f"--by {self.by!r} must be tokens or text")
        if not 0 < self.engine_timeout <= 7 * 86_400:
            raise ConfigError(f"--engine-timeout {self.engine_timeout} must be seconds, more than 0 and at most a week")
        key = engine_key(self.engine_key_file)
        servers = [Server(url, key, self.engine_timeout) for url in self.url or ()]
        for place, server in enumerate(servers):
            if server.url in [each.url for each in servers[:place]]:
                raise ConfigError(f"--url {server.url} is given twice; give each server once")
        return [Engine(server, By(self.by)) for server in servers]


@dataclass(frozen=True, slots=True)
class Result:
    """Options that say what becomes of answers."""

    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="OUT", help="Answers; -: to stdout.", show_default=False)
    ] = None
    order: Annotated[str, typer.Option(help="Of the output's lines: input, or done: as they were answered.")] = "input"
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what came of it, as JSON.", show_default=False)
    ] = None
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw how it went, .png or .svg.", show_default=False)
    ] = None
    as_json: JsonOption = False

    def checked(self, batch: str) -> str:
        """The output of that input. Raises ConfigError, before anything is sent."""
        from loracache.batch.journal import Order, draft_of, journal_of

        if self.output is None:
            raise ConfigError("no output is named; give -o OUT.jsonl, or -o - for standard output")
        if self.order not in tuple(Order):
            raise ConfigError(f"--order {self.order!r} must be input or done")
        if self.plot is not None:
            check_plot(self.plot)
        if self.output == "-" and output_is_closed():
            raise ConfigError("-o -: standard output cannot be written to; give -o a file")
        taken: dict[str, Path] = {}
        if self.output != "-":
            output = Path(self.output)
            taken = {"the output": output, "the output's journal": journal_of(output), "its draft": draft_of(output)}
            for what, path in taken.items():
                if batch != "-" and _is_one_file(path, Path(batch)):
                    raise ConfigError(f"-o {output}: {what} would be the input, {batch}; name another output")
        if batch != "-":
            taken["the input"] = Path(batch)
        for option, own in (("--report", self.report), ("--plot", self.plot)):
            if own is not None:
                _check_writable(option, own, taken)
                taken[option] = own
        return self.output

    def tell(self, done: Report, title: str) -> None:
        """What came of it."""
        if self.report is not None:
            _write_json(self.report, done.as_dict())
        if self.plot is not None:
            from loracache.batch.plot import plot

            plot(self.plot, done, title)
        if self.output == "-":
            typer.echo(report_line(done), err=True)
        elif self.as_json:
            print_json(done.as_dict())
        else:
            print_report(done)


@app.command("plan")
@expanded
def plan(batch: _InputArgument, engines: Engines, as_json: JsonOption = False) -> None:
    """Show what a batch shares, and the prompt tokens that are computed in the file's order, in the plan's, and at
    least. Without --url it goes by text, and --kv-tokens says how much KV there is."""
    _show_plan(batch, engines, as_json)


@app.command("run")
@expanded
def run(
    batch: _InputArgument,
    engines: Engines,
    result: Result,
    vllm: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTION...]", help="Of vLLM, for --model.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Start a vLLM that serves it, and end it after.", show_default=False)
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Of the daemon behind --model.", show_default=_MEMORY)] = None,
    socket: Annotated[
        Path | None, typer.Option(help="Unix socket of the daemon that the engines share.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and send nothing.")] = False,
    patience: Annotated[
        float, typer.Option(metavar="SECONDS", parser=number, help="To wait for a server that is gone.")
    ] = 300.0,
) -> None:
    """Send a batch to running OpenAI servers, or to a vLLM of its own. Killed, the same command goes on where it was. 4
    where a request failed."""
    if dry_run and result.output is None:
        _show_plan(batch, engines, result.as_json)
        return
    output = result.checked(batch)
    if not 0 <= patience <= 7 * 86_400:
        raise ConfigError(f"--patience {patience} must be seconds, 0 or more and at most a week")
    if bool(engines.url) == bool(model):
        raise ConfigError("give either --url http://HOST:PORT/v1 of a running server, or --model of one to start")
    if vllm and not model:
        raise ConfigError(f"{vllm[0]!r}: options of vLLM go with --model")
    if memory and (socket or not model):
        raise ConfigError(f"--memory {memory}: it is of the daemon that --model starts without --socket; leave it out")
    if model and model.startswith(("/", "./", "../")) and not Path(model).exists():
        raise ConfigError(f"--model {model} is not there; give a model's folder, or its name")
    socket = None if socket is None else socket.absolute()
    if socket is not None:
        with CacheClient(f"unix://{socket}", name="batch"):
            pass  # else each answer would be a pin that failed
    if dry_run:
        _show_plan(batch, engines, result.as_json)
        return
    own = None if model is None else _Own(model, tuple(vllm or ()), memory or _MEMORY)
    done = _run(batch, engines, own, socket, output, result.order, patience)
    result.tell(done, f"{Path(batch).name}, {done.answered:,} of {done.requests:,} requests in {done.seconds:.0f} s")
    if done.errors:
        raise typer.Exit(PARTLY)


@dataclass(frozen=True, slots=True)
class _Own:
    """The engine that a batch starts; see ChildEngine."""

    model: str
    options: tuple[str, ...]
    memory: str


def _run(
    batch: str, engines: Engines, own: _Own | None, socket: Path | None, output: str, order: str, patience: float
) -> Report:
    import asyncio
    import shutil
    import tempfile

    from loracache.batch.journal import Journal
    from loracache.batch.lines import BatchFile
    from loracache.batch.runner import Limits

    servers = engines.engines()
    _allow_connections()
    with (
        contextlib.closing(BatchFile(batch)) as file,
        tempfile.TemporaryDirectory(prefix="loracache-batch-") as folder,
    ):
        target = Path(folder, "answers.jsonl") if output == "-" else Path(output)
        with contextlib.closing(Journal(target, file.digest, lasting=output != "-")) as journal:
            limits = Limits(engines.running, patience)
            if own is None:
                done = asyncio.run(_send(file, journal, servers, engines, limits, socket))
            else:
                done = asyncio.run(_send_to_own(file, journal, own, engines, limits, Path(folder), socket))
            journal.finish(order)
        if output == "-":
            try:
                with target.open("rb") as answers:
                    shutil.copyfileobj(answers, sys.stdout.buffer)
                sys.stdout.buffer.flush()
            except BrokenPipeError:
                raise
            except OSError as error:
                told = f"standard output cannot be written: {error.strerror}"
                raise Unavailable(f"{told}; what was answered is lost; give -o a file to keep it") from None
    return done


def _allow_connections() -> None:
    """As many open files as this process may have: a connection for each request under way."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _send(
    file: BatchFile,
    journal: Journal,
    servers: list[Engine],
    engines: Engines,
    limits: Limits,
    socket: Path | None,
    *,
    prioritized: bool = False,
) -> Report:
    """socket: of the daemon that the engines share, where prefixes are pinned; None for none. prioritized: see
    Runner."""
    from loracache.batch.engine import Engine, ask_one
    from loracache.batch.pins import Pins
    from loracache.batch.runner import Runner, room_of

    try:
        room = await room_of(servers, engines.kv_tokens, engines.block_tokens)
        base = "" if socket is None else await ask_one(servers, Engine.base_model)

        def pins_of(job: Job) -> Pins:
            return Pins(f"unix://{socket}", servers, base, job)

        with progress() as on_change:
            pinning = None if socket is None else pins_of
            return await Runner(file, journal, servers, room, limits, on_change, pinning, prioritized).run()
    finally:
        for each in servers:
            await each.server.close()


async def _send_to_own(
    file: BatchFile, journal: Journal, own: _Own, engines: Engines, limits: Limits, folder: Path, socket: Path | None
) -> Report:
    """To an engine that is started for it, and ends with it. Raises ConfigError when it ends before."""
    import asyncio

    from loracache.batch.child import ChildEngine
    from loracache.batch.runner import OTHER_BLOCK
    from loracache.batch.tokenizing import much_alike

    shared = much_alike(file, lambda number: number not in journal, engines.block_tokens or OTHER_BLOCK)
    memory = own.memory if shared else ""  # little would be found in it
    async with ChildEngine(own.model, own.options, folder, memory, socket) as child:
        servers = replace(engines, url=[child.url]).engines()
        watch = asyncio.create_task(child.watch())  # nobody starts it again: it is not waited for
        sent = asyncio.create_task(
            _send(file, journal, servers, engines, limits, child.socket, prioritized=child.prioritized)
        )
        try:
            done, _ = await asyncio.wait([sent, watch], return_when=asyncio.FIRST_COMPLETED)
            if sent not in done:
                await watch
            return await sent
        finally:
            for task in (sent, watch):
                task.cancel()
            await asyncio.gather(sent, watch, return_exceptions=True)


def _show_plan(batch: str, engines: Engines, as_json: bool) -> None:
    import asyncio

    from loracache.batch.lines import BatchFile

    with contextlib.closing(BatchFile(batch)) as file:
        figures, faults = asyncio.run(_figures(file, engines))
    if as_json:
        print_json(figures.as_dict() | {"faults": faults})
        return
    print_figures(figures)
    for told in faults:
        typer.echo(told, err=True)


async def _figures(file: BatchFile, options: Engines) -> tuple[Figures, list[str]]:
    from loracache.batch.job import Lengths, by_text, make_job
    from loracache.batch.runner import room_of
    from loracache.batch.tokenizing import Tokenizing

    engines = options.engines()
    if not engines and options.kv_tokens is None:
        raise ConfigError("no KV cache is known; give --kv-tokens N, or --url of an engine that says it")
    faults: list[str] = []
    try:
        room = await room_of(engines, options.kv_tokens, options.block_tokens)
        tokens_of = (
            Tokenizing(file, lambda number: True, room.block_tokens, engines[0].tokens).tokens if engines else by_text
        )
        job = await make_job(
            file, tokens_of, room.block_tokens, Lengths(), lambda line: True, lambda fault: faults.append(fault.message)
        )
    finally:
        for engine in engines:
            await engine.server.close()
    return job.figures(room.kv_tokens, options.running), faults


def _is_one_file(one: Path, other: Path) -> bool:
    """Whether two names are of one file, which may not be there yet."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there
        return False


def _check_writable(option: str, path: Path, taken: Mapping[str, Path]) -> None:
    """Raises ConfigError where that file cannot be written, or is one of those `taken` (what it is: its name)."""
    for what, other in taken.items():
        if _is_one_file(path, other):
            raise ConfigError(f"{option} {path} is {what}; name another file")
    if path.is_dir() or not os.access(path if os.path.exists(path) else path.absolute().parent, os.W_OK):
        raise ConfigError(f"{option} {path} cannot be written: it is a folder, or its own cannot be written to")


def _write_json(path: Path, value: Any) -> None:
    import json

    try:
        path.write_text(json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise Unavailable(f"--report {path} cannot be written: {error.strerror}") from None
