# SPDX-License-Identifier: Apache-2.0
"""How objects are named on the command line, and what is refused there: with the value and the fix, exit code 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

KEY = "ab" * 32


def ids(tokens: list[int]) -> str:
    return ",".join(map(str, tokens))


# -- what is understood ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [ids, json.dumps, lambda ids: "\n".join(map(str, ids)), lambda ids: f" {ids} \n"])
def test_tokens_come_from_the_command_line_stdin_or_a_file(cli: Any, prompt: Any, write: Any, tmp_path: Path) -> None:
    tokens, _ = prompt(2)
    text = write(tokens)
    (tmp_path / "tokens").write_text(text)
    for where, stdin in ((["--tokens", text], ""), (["--tokens", "-"], text), (["--tokens-file", "-"], text),
                         (["--tokens-file", tmp_path / "tokens"], "")):  # fmt: skip
        assert cli("lookup", "--model", "model", *where, "--json", stdin=stdin).json["tokens"] == 8


def test_keys_come_from_stdin_beside_those_that_are_given(cli: Any, prompt: Any) -> None:
    _, keys = prompt(3)
    rest = f"{keys[1].hex()}\n\n{keys[2].hex().upper()}\n"
    found = cli("lookup", "--key", keys[0].hex(), "--key", "-", "--json", stdin=rest)
    assert (found.json["hits"], found.json["asked"]) == (3, 3)


def test_any_model_and_the_base_model_can_be_meant(cli: Any, prompt: Any) -> None:
    tokens, _ = prompt(2, model="starred")
    adapter = "cd" * 32
    adapted, _ = prompt(1, model="starred", adapter=adapter)
    for model, more, count in (("*", [], 8), ("starred", ["--adapter", ""], 8), ("*", ["--adapter", adapter], 0)):
        assert cli("lookup", "--model", model, "--tokens", ids(tokens), *more, "--json").json["tokens"] == count
    assert cli("lookup", "--model", "*", "--tokens", ids(adapted), "--adapter", adapter, "--json").json["tokens"] == 4
    assert cli("lookup", "--model", "starred", "--adapter", "", "--json").json["held"]["cpu"][0] == 2


def test_a_tenants_prompt_is_found_with_its_salt_alone(cli: Any, prompt: Any) -> None:
    tokens, _ = prompt(2, salt="größer")
    asked = ["lookup", "--model", "model", "--tokens", ids(tokens), "--json"]
    assert cli(*asked).json["tokens"] == 0
    assert cli(*asked, "--salt", "größer").json["tokens"] == 8
    assert cli(*asked, "--salt", "-", stdin="größer\n").json["tokens"] == 8


# -- what is refused ---------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[list[str], list[str]]] = {
    "nothing": ([], ["nothing is selected", "--key, --adapter, --model"]),
    "no hex": (["--key", "xyz"], ["--key 'xyz' is not a key", "64 hexadecimal digits"]),
    "short": (["--key", "ab"], ["--key 'ab'"]),
    "spaces in hex": (["--key", " ".join(["ab"] * 32)], ["is not a key"]),
    "empty key": (["--key", ""], ["--key '' is not a key"]),
    "keys and model": (["--key", KEY, "--model", "m"], ["--key goes without --model", "leave one out"]),
    "keys and salt": (["--key", KEY, "--salt", "s"], ["--key goes without --salt"]),
    "keys and tokens": (["--key", KEY, "--tokens", "1"], ["--key goes without --tokens"]),
    "keys and adapter": (["--key", KEY, "--adapter", "a"], ["--key goes without --adapter"]),
    "two prompts": (["--tokens", "1", "--tokens-file", "x", "--model", "m"], ["--tokens and --tokens-file both"]),
    "tokens and engine": (["--tokens", "1", "--engine", "http://h", "--prompt", "p"], ["--tokens and --prompt"]),
    "tokens of no model": (["--tokens", "1"], ["--tokens needs the model", "--model '*'"]),
    "empty tokens": (["--model", "m", "--tokens", ""], ["--tokens holds no token ids"]),
    "empty list": (["--model", "m", "--tokens", "[]"], ["--tokens holds no token ids"]),
    "a word": (["--model", "m", "--tokens", "1,two"], ["holds 'two'", "32 bits"]),
    "a fraction": (["--model", "m", "--tokens", "[1.5]"], ["holds '1.5'"]),
    "a boolean": (["--model", "m", "--tokens", "[true]"], ["holds 'True'"]),
    "nested": (["--model", "m", "--tokens", "[[1]]"], ["holds '[1]'"]),
    "half a list": (["--model", "m", "--tokens", "[1, 2"], ["begins like a JSON list and is none"]),
    "33 bits": (["--model", "m", "--tokens", "2147483648"], ["holds '2147483648'"]),
    "very many bits": (["--model", "m", "--tokens", "9" * 5000], ["holds '9999"]),
    "very many bits in a list": (["--model", "m", "--tokens", f"[{'9' * 5000}]"], ["is none"]),
    "deep": (["--model", "m", "--tokens", "[" * 20_000], ["begins like a JSON list and is none"]),
    "no file": (["--model", "m", "--tokens-file", "/nowhere/x"], ["--tokens-file /nowhere/x cannot be read: No such"]),
    "empty model": (["--model", ""], ["--model is empty", "'*' for any"]),
    "empty adapter": (["--adapter", ""], ["--adapter is empty", "give --model"]),
    "empty salt": (["--salt", ""], ["--salt is empty", "leave it out"]),
    "long model": (["--model", "m" * 301], ["301 characters"]),
    "long adapter": (["--adapter", "m" * 301], ["301 characters"]),
    "long salt": (["--salt", "m" * 1001], ["1001 characters"]),
    "stdin twice": (["--model", "m", "--tokens", "-", "--salt", "-"], ["--tokens and --salt would read stdin"]),
    "keys twice": (["--key", "-", "--key", "-"], ["--key twice would read stdin"]),
    "prompt without engine": (["--prompt", "p"], ["--prompt needs a tokenizer", "--engine URL"]),
    "engine without prompt": (["--engine", "http://h"], ["--engine only tokenizes", "--prompt or --messages"]),
    "no URL": (["--engine", "localhost:8000", "--prompt", "p"], ["'localhost:8000'", "http://127.0.0.1:8000"]),
    "no port": (["--engine", "http://h:x", "--prompt", "p"], ["'http://h:x'"]),
    "no address": (["--engine", "http://[1", "--prompt", "p"], ["'http://[1'"]),
    "no ASCII": (["--engine", "http://h/größer", "--prompt", "p"], ["is not an address of a server"]),
    "file URL": (["--engine", "file:///etc/passwd", "--prompt", "p"], ["is not an address of a server"]),
    "engine's timeout": (["--engine", "http://h", "--prompt", "p", "--engine-timeout", "-1"], ["timeout -1.0"]),
    "no key file": (["--engine", "http://h", "--prompt", "p", "--engine-key-file", "/nowhere/k"], ["/nowhere/k"]),
    "no chat": (["--engine", "http://h", "--messages", "/nowhere/m"], ["--messages /nowhere/m cannot be read"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_selector_is_refused_with_the_value_and_the_fix(refused: Any, case: str) -> None:
    arguments, said = WRONG[case]
    message = refused("lookup", *arguments)
    assert [text for text in said if text not in message] == [], message


def test_a_password_in_the_engines_address_is_not_repeated(refused: Any) -> None:
    message = refused("lookup", "--engine", "http://me:hidden@h:8000", "--prompt", "p")
    assert "VLLM_API_KEY" in message
    assert "hidden" not in message


@pytest.mark.parametrize("option", ["--key", "--salt", "--tokens"])
def test_an_empty_stdin_selects_nothing(refused: Any, option: str) -> None:
    more = ["--model", "m"] if option == "--tokens" else []
    message = refused("evict", option, "-", *more, "--yes")
    assert "stdin" in message or "no token ids" in message


def test_stdin_that_is_no_text_is_refused(refused: Any) -> None:
    assert "not UTF-8" in refused("lookup", "--salt", "-", stdin=b"\xff\xfe")


def test_more_than_can_be_asked_for_at_once_is_refused(refused: Any) -> None:
    assert "1048577 token ids; at most 1048576" in refused(
        "lookup", "--model", "m", "--tokens", "-", stdin="1 " * 1048577
    )
    assert "100001 keys; give at most 100000" in refused("lookup", "--key", "-", stdin=f"{KEY}\n" * 100_001)


OPTIONS: dict[str, tuple[list[str], list[str]]] = {
    "negative ttl": (["pin", "--key", KEY, "--ttl", "-1"], ["--ttl -1.0", "more than 0 and at most 3600"]),
    "admit for no time": (["admit", "--key", KEY, "--ttl", "0"], ["--ttl 0.0", "leave it out to hold nothing"]),
    "ttl 0": (["pin", "--key", KEY, "--ttl", "0"], ["--ttl 0.0"]),
    "endless ttl": (["pin", "--key", KEY, "--ttl", "inf"], ["--ttl inf"]),
    "ttl nan": (["pin", "--key", KEY, "--ttl", "nan"], ["--ttl nan"]),
    "ttl of a day": (["pin", "--key", KEY, "--ttl", "86400"], ["--ttl 86400.0", "leave it out to pin until unpinned"]),
    "ttl a word": (["pin", "--key", KEY, "--ttl", "long"], ["--ttl", "'long'"]),
    "pin in redis": (["pin", "--key", KEY, "--tier", "redis"], ["--tier 'redis'", "cpu or disk"]),
    "unknown tier": (["admit", "--key", KEY, "--tier", "tape"], ["--tier 'tape'", "cpu or disk or redis"]),
    "one unknown": (["evict", "--key", KEY, "--tier", "cpu,tape"], ["--tier 'tape'"]),
    "no tier": (["clear", "--tier", ""], ["--tier ''"]),
    "compress cpu": (["compress", "--key", KEY, "--tier", "cpu"], ["--tier 'cpu'", "disk or redis"]),
    "list redis": (["objects", "--tier", "redis"], ["'redis' cannot be listed", "cpu or disk"]),
    "move to gpu": (["move", "cpu", "gpu", "--key", KEY], ["TARGET 'gpu'"]),
    "move nowhere": (["move", "cpu", "cpu", "--key", KEY], ["SOURCE and TARGET are both cpu"]),
    "negative wait": (["evict", "--key", KEY, "--wait", "-1"], ["--wait -1.0", "0 or more"]),
    "wait nan": (["evict", "--key", KEY, "--wait", "nan"], ["--wait nan"]),
    "both waits": (["evict", "--key", KEY, "--wait", "1", "--no-wait"], ["--wait 1 and --no-wait", "leave one out"]),
    "show's wait": (["operations", "show", "1", "--wait", "-2"], ["--wait -2.0"]),
    "limit 0": (["objects", "--limit", "0"], ["--limit", "'0' is not a whole number from 1"]),
    "limit a word": (["objects", "--limit", "x"], ["--limit", "'x'"]),
    "negative since": (["events", "--since", "-1"], ["--since", "'-1'"]),
    "huge since": (["events", "--since", str(2**63)], ["--since", str(2**63), f"to {2**63 - 1}"]),
    "interval 0": (["top", "--once", "--interval", "0"], ["--interval 0.0", "from 0.1 to 3600"]),
    "interval nan": (["top", "--once", "--interval", "nan"], ["--interval nan"]),
    "no node": (["tree", "--depth", "0"], ["--depth", "'0'"]),
    "flush": (["flush", "--timeout", "-5"], ["--timeout -5.0"]),
    "no such verb": (["evcit", "--key", KEY], ["evcit"]),
    "no such option": (["evict", "--kye", KEY], ["--kye"]),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_a_wrong_option_is_refused_with_the_value_and_the_fix(refused: Any, case: str) -> None:
    arguments, said = OPTIONS[case]
    message = refused(*arguments)
    assert [text for text in said if text not in message] == [], message
