# SPDX-License-Identifier: Apache-2.0
"""What the commands share: exit codes, how the daemon is named, and options that come in groups."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

from loracache.client.client import CacheClient
from loracache.client.control import OperationReport
from loracache.errors import ConfigError, LoRACacheError, Unknown, UsageError
from loracache.wire.protocol import Request

__all__ = [
    "EXIT_CODES", "FAULTS", "INTERRUPTED", "NOTHING", "PARTLY", "REFUSED", "Commands", "JsonOption", "SocketOption",
    "SteeringClient", "check_plot", "client_of", "discard_output", "engine_key", "expanded", "file_text", "integer",
    "number", "open_closed_streams", "output_is_closed", "print_json", "socket_of", "tell",
]  # fmt: skip

REFUSED, USAGE, NOTHING, PARTLY, INTERRUPTED, NO_READER = 1, 2, 3, 4, 130, 141
FAULTS = 1
EXIT_CODES = (
    "Exit codes: 0 done; 1 the daemon (or the engine) is not there or refused, the output cannot be written, or check "
    "left faults; 2 wrong usage or configuration; 3 nothing found; 4 done in part: something was skipped, or is not "
    "done yet; 130 interrupted; 141 nobody reads the output any more."
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SocketOption = Annotated[
    Path | None, typer.Option("--socket", help="Unix socket of the daemon [LORACACHE_SOCKET].", show_default=False)
]


def number(text: object) -> float:
    """An option's value as seconds, or typer's error naming it."""
    try:
        return float(str(text))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number of seconds; give one like 2.5") from None


def integer(least: int, most: int) -> Callable[[object], int]:
    """What makes an option's value a whole number of that range, or typer's error naming it."""

    def parse(text: object) -> int:
        if not re.fullmatch(r"-?[0-9]{1,20}", str(text)) or not least <= int(str(text)) <= most:
            raise typer.BadParameter(f"{text!r} is not a whole number from {least} to {most}")
        return int(str(text))

    return parse


class Commands(TyperGroup):
    """The command itself: every error of ours ends it with its exit code and one line."""

    def invoke(self, ctx: Any) -> Any:
        """Run what was asked for."""
        try:
            done = super().invoke(ctx)
            sys.stdout.flush()
            return done
        except BrokenPipeError:
            discard_output()
            raise typer.Exit(NO_READER) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except LoRACacheError as error:
            tell(f"loracache: {error}")
            raise typer.Exit(_code(error)) from None
        except MemoryError:
            tell("loracache: this process may take no more memory; raise its limits (ulimit -v)")
            raise typer.Exit(REFUSED) from None


def open_closed_streams() -> None:
    """What a process was started without (`>&-`) leads nowhere: no file that is opened later takes its number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def output_is_closed() -> bool:
    """Whether this process was started without a standard output that can be written to."""
    if getattr(sys.stdout, "name", "") == os.devnull:
        return True
    try:
        os.write(sys.stdout.fileno(), b"")
    except ValueError:  # it has no file
        return False
    except OSError:
        return True
    return False


def tell(text: str) -> None:
    """A line on standard error, if that can be written to."""
    with contextlib.suppress(OSError):
        typer.echo(text, err=True)


def discard_output() -> None:
    """What is left in standard output's buffer goes nowhere, quietly."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _code(error: LoRACacheError) -> int:
    if isinstance(error, ConfigError | UsageError):
        return USAGE
    return NOTHING if isinstance(error, Unknown) else REFUSED


class SteeringClient(CacheClient):
    """A client that begins operations without waiting for their end."""

    def __enter__(self) -> SteeringClient:
        return self

    def begin(self, request: Request) -> OperationReport:
        """The operation that `request`, one with `wait`, starts."""
        return self._operation(request)


def socket_of(socket: Path | None) -> Path:
    """`socket`, or LORACACHE_SOCKET, as an absolute path. Raises ConfigError where neither is given."""
    path = socket or os.environ.get("LORACACHE_SOCKET")
    if not path:
        raise ConfigError("no daemon is named; give --socket PATH or set LORACACHE_SOCKET")
    return Path(path).absolute()


def client_of(socket: Path | None, timeout: float = 10.0) -> SteeringClient:
    """A client of the daemon at `socket_of(socket)`."""
    return SteeringClient(f"unix://{socket_of(socket)}", timeout=timeout, name="cli")


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, where each parameter that is a dataclass becomes that class's fields, each an option. Several commands
    share options in this way, which typer has no means for."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[type, list[str]]] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if not dataclasses.is_dataclass(parameter.annotation):
            parameters.append(parameter)
            continue
        hints = get_type_hints(parameter.annotation, include_extras=True)
        fields = dataclasses.fields(parameter.annotation)
        groups[parameter.name] = (parameter.annotation, [each.name for each in fields])  # type: ignore[assignment]
        parameters += [
            inspect.Parameter(each.name, parameter.KEYWORD_ONLY, default=each.default, annotation=hints[each.name])
            for each in fields
        ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        made = {name: cls(**{each: given.pop(each) for each in names}) for name, (cls, names) in groups.items()}
        command(**given, **made)

    own = [each.replace(kind=each.KEYWORD_ONLY) for each in parameters]
    run.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in own}
    return run


def print_json(value: Any) -> None:
    """One JSON document on standard output; an iterator is written as a list, item by item."""
    import json

    if not isinstance(value, Iterator):
        typer.echo(json.dumps(value, indent=2))
        return
    before = "["
    for item in value:
        typer.echo(f"{before}\n  {json.dumps(item)}", nl=False)
        before = ","
    typer.echo("[]" if before == "[" else "\n]")


def file_text(path: Path | None, name: str) -> str:
    """What is in the file that option `name` gives. Raises ConfigError."""
    assert path is not None
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{name} {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{name} {path} is not UTF-8; give a text file") from None


def check_plot(path: Path) -> None:
    """Raises ConfigError where nothing can be drawn into that file, before all is computed for it."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"--plot {path}: it can be .png or .svg")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.parent}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install 'loracache[plot]'") from None


def engine_key(path: Path | None) -> str:
    """An engine's API key: of --engine-key-file, or of the environment. Raises ConfigError."""
    if path is None:
        return os.environ.get("VLLM_API_KEY", "")
    key = file_text(path, "--engine-key-file").strip()
    if not key:
        raise ConfigError(f"--engine-key-file {path} is empty; put the engine's API key in it")
    return key
