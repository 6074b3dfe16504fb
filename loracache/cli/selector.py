# SPDX-License-Identifier: Apache-2.0
"""The options by which commands name objects: by key, adapter, model, tokens, tenant, or a prompt that an engine
tokenizes. What contradicts itself is refused here, with the option and the fix."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from loracache.cli.common import engine_key, file_text, number
from loracache.cli.completion import complete_adapter, complete_model
from loracache.client.control import Selection
from loracache.errors import ConfigError

__all__ = ["SelectionOptions", "is_whole"]

_KEY = re.compile(r"[0-9a-fA-F]{64}")
_NUMBER = re.compile(r"[+-]?[0-9]{1,10}")
_MOST_KEYS = 100_000
_MOST_TOKENS = 1 << 20
_MOST_NAME = 300
_MOST_SALT = 1000
_PANEL = "Which objects"


def _option(*names: str, about: str, metavar: str, **more: Any) -> Any:
    return typer.Option(*names, help=about, metavar=metavar, rich_help_panel=_PANEL, show_default=False, **more)


@dataclass(frozen=True, slots=True)
class SelectionOptions:
    """Which objects a command is about, as it was given."""

    key: Annotated[
        list[str] | None, _option("--key", metavar="HEX", about="A key; may be repeated. -: from stdin, one a line.")
    ] = None
    adapter: Annotated[
        str | None,
        _option(
            "--adapter",
            metavar="NAME",
            about='An adapter, by name or digest; with a model "": none.',
            autocompletion=complete_adapter,
        ),
    ] = None
    model: Annotated[
        str | None,
        _option(
            "--model",
            metavar="NAME",
            about="A model, by served name or identity; *: any.",
            autocompletion=complete_model,
        ),
    ] = None
    tokens: Annotated[
        str | None, _option("--tokens", metavar="IDS", about="A prompt's token ids: 1,2,3. -: from stdin.")
    ] = None
    tokens_file: Annotated[
        Path | None, _option("--tokens-file", metavar="FILE", about="The same in a file: 1 2 3, 1,2,3 or a JSON list.")
    ] = None
    salt: Annotated[
        str | None, _option("--salt", metavar="TEXT", about="A tenant's cache_salt; -: from stdin, in no process list.")
    ] = None
    engine: Annotated[
        str | None, _option("--engine", metavar="URL", about="A running vLLM that tokenizes --prompt or --messages.")
    ] = None
    prompt: Annotated[
        str | None, _option("--prompt", metavar="TEXT", about="A prompt, for --engine. -: from stdin.")
    ] = None
    messages: Annotated[
        Path | None, _option("--messages", metavar="FILE", about="A chat, for --engine: a JSON list of messages.")
    ] = None
    engine_key_file: Annotated[
        Path | None, _option("--engine-key-file", metavar="FILE", about="The engine's API key [VLLM_API_KEY].")
    ] = None
    engine_timeout: Annotated[
        float, _option("--engine-timeout", metavar="SECONDS", parser=number, about="For each answer of the engine; 30.")
    ] = 30.0

    @property
    def given(self) -> bool:
        """Whether any option says which objects."""
        named = (
            self.key or None,
            self.adapter,
            self.model,
            self.tokens,
            self.tokens_file,
            self.salt,
            self.engine,
            self.prompt,
        )
        return any(each is not None for each in (*named, self.messages))

    def selection(self) -> Selection:
        """What they select; asks the engine, where one is given. Raises ConfigError, and what Engine raises."""
        if not self.given:
            raise ConfigError(
                "nothing is selected; give --key, --adapter, --model, --salt, or a prompt by --tokens or --engine"
            )
        self._check()
        if self.key:
            return Selection(keys=_keys(self.key))
        salt = self._salt()
        if self.engine is not None:
            return self._of_engine(salt)
        tokens = self._tokens()
        return Selection(model=self.model or "", tokens=tokens, adapter=self.adapter, salt=salt)

    def _check(self) -> None:
        prompts = {"--tokens": self.tokens, "--tokens-file": self.tokens_file, "--prompt": self.prompt,
                   "--messages": self.messages}  # fmt: skip
        given = [name for name, value in prompts.items() if value is not None]
        others = {"--adapter": self.adapter, "--model": self.model, "--salt": self.salt, "--engine": self.engine}
        if self.key and (given or any(value is not None for value in others.values())):
            also = [*given, *(name for name, value in others.items() if value is not None)]
            raise ConfigError(f"--key goes without {', '.join(also)}: keys say it all; leave one out")
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} both give a prompt; leave one out")
        asks = bool({"--prompt", "--messages"} & set(given))
        if asks and self.engine is None:
            raise ConfigError(f"{given[0]} needs a tokenizer; give --engine URL of a running vLLM, or --tokens")
        if self.engine is not None and not asks:
            raise ConfigError("--engine only tokenizes; give it --prompt or --messages, or leave it out")
        if not 0 < self.engine_timeout <= 3600:
            raise ConfigError(f"--engine-timeout {self.engine_timeout} must be seconds, more than 0 and at most 3600")
        if given and not asks and self.model is None:
            raise ConfigError(f"{given[0]} needs the model that the tokens are of; give --model NAME, or --model '*'")
        self._check_names()
        readers = [name for name, value in (prompts | {"--salt": self.salt}).items() if str(value) == "-"]
        if len(readers) > 1 or (self.key or []).count("-") > 1:
            raise ConfigError(f"{' and '.join(readers) or '--key twice'} would read stdin; only one can")

    def _check_names(self) -> None:
        for name, value, most in (("--adapter", self.adapter, _MOST_NAME), ("--model", self.model, _MOST_NAME)):
            if value is not None and len(value) > most:
                raise ConfigError(f"{name} {value[:20]!r}... has {len(value)} characters; at most {most} are a name")
        if self.model == "":
            raise ConfigError("--model is empty; give a served name or an identity, or '*' for any")
        if self.adapter == "" and self.model is None and self.salt is None and self.engine is None:
            raise ConfigError("--adapter is empty, which means a base model; give --model, too")
        if self.salt == "":
            raise ConfigError("--salt is empty; leave it out for requests without one")

    def _salt(self) -> str | None:
        salt = _stdin("--salt").removesuffix("\n") if self.salt == "-" else self.salt
        if salt == "":
            raise ConfigError("--salt - read nothing from stdin; leave it out for requests without a salt")
        if salt is not None and len(salt) > _MOST_SALT:
            raise ConfigError(f"--salt has {len(salt)} characters; a cache_salt has at most {_MOST_SALT}")
        return salt

    def _tokens(self) -> list[int] | None:
        if self.tokens is None and self.tokens_file is None:
            return None
        name = "--tokens" if self.tokens is not None else f"--tokens-file {self.tokens_file}"
        if self.tokens is not None:
            text = _stdin(name) if self.tokens == "-" else self.tokens
        else:
            text = _stdin(name) if str(self.tokens_file) == "-" else file_text(self.tokens_file, "--tokens-file")
        return _checked(name, _token_ids(name, text))

    def _of_engine(self, salt: str | None) -> Selection:
        from loracache.cli.engine_tokens import Engine

        engine = Engine(self.engine or "", engine_key(self.engine_key_file), self.engine_timeout)
        if self.messages is not None:
            request = _chat(self.messages)
        else:
            request = {"prompt": _stdin("--prompt") if self.prompt == "-" else self.prompt}
        found = engine.tokenize(request, "" if self.model in (None, "*") else str(self.model))
        if found.adapter is not None and self.adapter not in (None, found.adapter):
            raise ConfigError(
                f"--model {self.model!r} is an adapter of the engine and --adapter says {self.adapter!r}; leave one out"
            )
        adapter = self.adapter if found.adapter is None else found.adapter
        return Selection(model=found.model, tokens=_checked("the prompt", found.tokens), adapter=adapter, salt=salt)


def is_whole(selection: Selection) -> bool:
    """Whether it is all of a model or a tenant."""
    return bool(selection.model or selection.salt is not None) and selection.tokens is None


def _keys(given: list[str]) -> list[bytes]:
    texts = [line for each in given for line in (_stdin("--key").split() if each == "-" else [each])]
    if not texts:
        raise ConfigError("--key - read nothing from stdin; give keys there, one a line")
    for text in texts:
        if not _KEY.fullmatch(text):
            raise ConfigError(f"--key {text[:80]!r} is not a key; give 64 hexadecimal digits")
    if len(texts) > _MOST_KEYS:
        raise ConfigError(f"--key gives {len(texts)} keys; give at most {_MOST_KEYS} at once")
    return [bytes.fromhex(text) for text in texts]


def _token_ids(name: str, text: str) -> list[Any]:
    if text.lstrip().startswith("["):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{name} begins like a JSON list and is none: {error}") from None
        assert isinstance(found, list)
        return found
    words = text.replace(",", " ").split()
    wrong = next((word for word in words if not _NUMBER.fullmatch(word)), None)
    if wrong is not None:
        raise ConfigError(f"{name} holds {wrong[:40]!r}, which is not a token id; give integers of 32 bits: 1,2,3")
    return [int(word) for word in words]


def _checked(name: str, ids: list[Any]) -> list[int]:
    if not ids:
        raise ConfigError(f"{name} holds no token ids; give at least one: 1,2,3")
    if len(ids) > _MOST_TOKENS:
        raise ConfigError(f"{name} holds {len(ids)} token ids; at most {_MOST_TOKENS} are a prompt")
    for each in ids:
        if type(each) is not int or not -(2**31) <= each < 2**31:
            wrong = str(each)[:40]
            raise ConfigError(f"{name} holds {wrong!r}, which is not a token id; give integers of 32 bits: 1,2,3")
    return ids


def _chat(path: Path) -> dict[str, Any]:
    """What /tokenize takes: of a list of messages, or of a request's body."""
    text = _stdin("--messages") if str(path) == "-" else file_text(path, "--messages")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--messages {path} is not JSON: {error}") from None
    body = found if isinstance(found, dict) else {"messages": found}
    if not isinstance(body.get("messages"), list) or not body["messages"]:
        raise ConfigError(f'--messages {path} holds no messages; give [{{"role": "user", "content": "..."}}]')
    return {key: value for key, value in body.items() if key != "prompt"}


def _stdin(name: str) -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise ConfigError(f"{name} - read something from stdin that is not UTF-8; give text") from None
