# SPDX-License-Identifier: Apache-2.0
"""What each verb does to a real daemon, what it prints, and its exit code."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from loracache import CacheClient
from loracache.cli.app import app
from loracache.cli.tables import size_text
from loracache.keys import salt_digest

SIZE = 1500
DONE, REFUSED, NOTHING, PARTLY = 0, 1, 3, 4


def ids(tokens: list[int]) -> str:
    return ",".join(map(str, tokens))


def of_prompt(tokens: list[int], model: str = "model") -> list[str]:
    return ["--model", model, "--tokens", ids(tokens)]


def of_keys(keys: list[bytes]) -> list[str]:
    return [word for key in keys for word in ("--key", key.hex())]


def columns(table: str) -> list[dict[str, str]]:
    """The rows of a plain table, by column. Its columns are at least two spaces apart."""
    header, *rows = table.splitlines()
    names = re.split(r"\s{2,}", header.strip())
    return [dict(zip(names, re.split(r"\s{2,}", row.strip()), strict=True)) for row in rows]


# -- looking -----------------------------------------------------------------------------------------------------------


def test_lookup_tells_how_far_a_prompt_is_held(cli: Any, client: CacheClient, prompt: Any) -> None:
    tokens, keys = prompt(3)
    client.flush()
    client.evict([keys[2]], tiers=["cpu", "disk"])
    client.evict([keys[1]], tiers=["cpu"])
    found = cli("lookup", *of_prompt(tokens), "--json")
    assert found.code == DONE
    told = {name: found.json[name] for name in ("hits", "asked", "tokens", "tiers")}
    assert told == {"hits": 2, "asked": 3, "tokens": 8, "tiers": ["cpu", "disk"]}
    shown = cli("lookup", *of_prompt(tokens))
    assert shown.code == DONE
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in shown.out.splitlines()}
    assert lines == {
        "hits": "2 of 3",
        "tokens": "8 of 12",
        "tiers": "cpu 1, disk 1",
        "namespace": found.json["namespace"],
    }
    assert cli("lookup", *of_keys(keys), "--json").json["tiers"] == ["cpu", "disk"]


def test_lookup_of_what_nobody_holds_is_exit_code_3(cli: Any, prompt: Any) -> None:
    tokens, _ = prompt(1)
    miss = cli("lookup", *of_prompt([tokens[0] + 1, *tokens[1:]]))
    assert (miss.code, miss.err) == (NOTHING, "")
    assert "hits       0 of 1" in miss.out
    assert cli("lookup", "--key", "ab" * 32).code == NOTHING
    unknown = cli("lookup", "--model", "no such model")
    assert unknown.code == NOTHING
    assert "no engine has registered a model 'no such model'" in unknown.err
    unknown = cli("lookup", "--adapter", "nobody")
    assert unknown.code == NOTHING
    assert "no adapter has the name or digest 'nobody'; see: loracache adapters list" in unknown.err


def test_lookup_of_a_model_or_tenant_tells_how_much_is_held(cli: Any, prompt: Any) -> None:
    prompt(2, model="counted")
    prompt(3, model="counted", salt="tenant")
    assert cli("lookup", "--model", "counted", "--json").json["held"]["cpu"] == [5, 5 * SIZE]
    assert cli("lookup", "--salt", "-", "--json", stdin="tenant\n").json["held"]["cpu"] == [3, 3 * SIZE]
    (row,) = [row for row in columns(cli("lookup", "--salt", "tenant").out) if row["tier"] == "cpu"]
    assert row == {"tier": "cpu", "objects": "3", "bytes": "4.4 KiB"}
    assert cli("lookup", "--salt", "nobody's").code == NOTHING


def test_objects_are_a_table_of_what_the_json_says(cli: Any, prompt: Any) -> None:
    tokens, keys = prompt(4, model="listed")
    listed = cli("objects", "--model", "listed", "--json").json
    assert {item["key"] for item in listed} == {key.hex() for key in keys}
    rows = columns(cli("objects", "--model", "listed").out)
    for row, item in zip(rows, listed, strict=True):
        assert (row["key"], row["kind"], row["size"]) == (item["key"], "kv", "1.5 KiB")
        assert row["tiers"] == ",".join(item["tiers"])
        assert (row["parent"], row["namespace"]) == (item["parent"] or "-", item["namespace"])
    assert len(cli("objects", *of_prompt(tokens, "listed"), "--limit", 2, "--json").json) == 2
    assert {key.hex() for key in keys} <= {item["key"] for item in cli("objects", "--json").json}
    assert cli("objects", "--key", "ab" * 32, "--json").out == "[]\n"
    assert len(cli("objects", "--key", "ab" * 32).out.splitlines()) == 1  # the header


def test_the_tree_goes_from_the_models_to_the_last_chunk(cli: Any, prompt: Any) -> None:
    _, keys = prompt(3, model="planted")
    (space,) = [node for node in cli("tree", "--json").json if "planted" in node.get("names", ())]
    assert space["depth"] == 1
    below = cli("tree", space["id"], "--depth", 50, "--json").json
    assert [(node["depth"], node["id"]) for node in below] == [(at, key.hex()) for at, key in enumerate(keys)]
    lines = cli("tree", space["id"], "--depth", 2).out.splitlines()
    assert [line.split("  chunk")[0].rstrip() for line in lines[1:]] == [keys[0].hex(), f"  {keys[1].hex()}"]
    assert len(cli("tree", "--depth", 9, "--limit", 2, "--json").json) == 2
    gone = cli("tree", "ab" * 32)
    assert (gone.code, "no object abab" in gone.err) == (NOTHING, True)


def test_an_adapters_node_is_found_by_its_name(cli: Any, client: CacheClient, prompt: Any, peft: Path) -> None:
    digest = client.add_adapter(str(peft), "team/planted")
    prompt(2, model="adapted", adapter=digest)
    (space,) = cli("tree", "adapter:team/planted", "--depth", 1, "--json").json
    assert (space["names"], space["objects"]["cpu"]) == (["adapted"], 2)
    (row,) = [line for line in cli("tree").out.splitlines() if line.startswith(f"adapter:{digest}")]
    assert "team/planted" in row
    unknown = cli("tree", "adapter:nobody")
    assert (unknown.code, "'nobody'" in unknown.err) == (NOTHING, True)
    assert cli("lookup", "--adapter", "team/planted").code == DONE
    assert cli("lookup", "--adapter", "team/planted", "--model", "adapted", "--json").json["held"]["cpu"][0] == 2


def test_events_are_a_line_each(cli: Any, client: CacheClient, prompt: Any) -> None:
    last, _, _ = client.events(1, wait=0.0, count=10_000)
    _, keys = prompt(2)
    client.pin([keys[0]])
    events = [json.loads(line) for line in cli("events", "--since", last, "--no-follow", "--json").out.splitlines()]
    assert [(each["event"], each["key"]) for each in events if each["tier"] == "cpu"] == [
        ("admitted", keys[0].hex()),
        ("admitted", keys[1].hex()),
        ("pinned", keys[0].hex()),
    ]
    lines = cli("events", "--since", last, "--no-follow").out.splitlines()
    for line, each in zip(lines, events, strict=False):  # the disk may have taken more meanwhile
        words = line.split()
        assert (words[0], words[2], words[3], words[-1]) == (str(each["id"]), each["event"], each["tier"], each["key"])
    remembered = cli("events", "--no-follow", "--json")
    assert remembered.err == ""
    assert keys[0].hex() in remembered.out
    client.unpin([keys[0]])


def test_config_shows_the_daemons_settings(cli: Any, running: Any) -> None:
    shown = cli("config", "--json").json
    assert (shown["memory"], shown["socket"]) == (16 << 20, str(running.socket))
    lines = dict(line.split(maxsplit=1) for line in cli("config").out.splitlines())
    assert (lines["memory"], lines["redis"]) == (str(16 << 20), "-")


# -- changing ----------------------------------------------------------------------------------------------------------


def test_evict_removes_what_is_selected_and_no_more(cli: Any, client: CacheClient, prompt: Any) -> None:
    tokens, keys = prompt(3)
    _, others = prompt(1)
    client.flush()
    done = cli("evict", "--key", keys[1].hex(), "--tier", "cpu")
    assert (done.code, done.out) == (DONE, "removed 2 objects (2.9 KiB), skipped 0\n")
    assert client.lookup(keys).tiers == ("cpu", "disk", "disk")
    report = cli("evict", *of_prompt(tokens), "--json")
    assert report.code == DONE
    told = {name: report.json[name] for name in ("verb", "state", "objects", "skipped")}
    assert told == {"verb": "evict", "state": "done", "objects": 4, "skipped": 0}
    assert client.lookup(keys).hits == 0
    assert client.lookup(others).hits == 1


def test_what_is_skipped_is_exit_code_4(cli: Any, client: CacheClient, prompt: Any) -> None:
    _, keys = prompt(2)
    assert cli("pin", "--key", keys[1].hex()).out == "pinned 1 objects, skipped 0\n"
    kept = cli("evict", *of_keys(keys), "--tiers", "cpu")
    assert (kept.code, kept.out) == (PARTLY, "removed 0 objects (0 B), skipped 2 (held 2)\n")
    assert cli("unpin", "--key", keys[1].hex()).code == DONE
    assert cli("evict", *of_keys(keys)).code == DONE


def test_pin_of_what_is_not_there_is_exit_code_3_and_of_some_of_it_4(cli: Any, prompt: Any) -> None:
    _, keys = prompt(1)
    missing = cli("pin", "--key", "ab" * 32)
    assert (missing.code, missing.out) == (NOTHING, "pinned 0 objects, skipped 1 (absent 1)\n")
    assert cli("pin", *of_keys(keys), "--key", "ab" * 32, "--ttl", 60).code == PARTLY


def test_move_copies_with_keep_and_moves_without(cli: Any, client: CacheClient, prompt: Any) -> None:
    tokens, keys = prompt(2)
    client.flush()
    client.evict(keys, tiers=["disk"])

    def where() -> set[tuple[str, ...]]:
        return {tuple(item["tiers"]) for item in client.objects() if bytes.fromhex(item["key"]) in keys}

    assert where() == {("cpu",)}
    assert cli("move", "cpu", "disk", *of_prompt(tokens), "--keep").code == DONE
    assert where() == {("cpu", "disk")}
    done = cli("move", "cpu", "disk", *of_prompt(tokens))
    assert (done.code, done.out) == (DONE, "moved 2 objects (2.9 KiB), skipped 0\n")
    assert where() == {("disk",)}
    assert cli("admit", *of_prompt(tokens)).out == "admitted 2 objects (2.9 KiB), skipped 0\n"
    again = cli("admit", *of_prompt(tokens))
    assert (again.code, "skipped 2 (already 2)" in again.out) == (DONE, True)  # which is all that was wanted


def test_compress_says_what_it_saved_and_decompress_undoes_it(cli: Any, client: CacheClient, prompt: Any) -> None:
    size = 20_000
    tokens, keys = prompt(2, size=size)
    client.flush()
    done = cli("compress", *of_prompt(tokens))
    (report,) = [each for each in client.operations() if each.verb == "compress"]
    assert report.saved > size
    saved = f"saved {size_text(report.saved)}"
    assert (done.code, done.out) == (DONE, f"compressed 2 objects (39.1 KiB), skipped 0, {saved}\n")
    again = cli("compress", *of_prompt(tokens))
    assert (again.code, again.out) == (DONE, "compressed 0 objects (0 B), skipped 2 (already 2), saved 0 B\n")
    assert cli("decompress", *of_prompt(tokens)).code == DONE
    stored = {item["key"]: item["stored"] for item in cli("objects", *of_prompt(tokens), "--json").json}
    assert all(stored[key.hex()] == size for key in keys)


def test_compress_of_noise_says_that_it_saved_nothing(cli: Any, client: CacheClient, prompt: Any) -> None:
    tokens, keys = prompt(2, size=20_000, content=os.urandom)
    client.flush()
    for _ in range(2):
        done = cli("compress", *of_prompt(tokens))
        said = "compressed 0 objects (0 B), skipped 2 (incompressible 2), saved 0 B\n"
        assert (done.code, done.out) == (DONE, said)  # which is all that can be had
    assert all(client.get(key) is not None for key in keys)


def test_what_redis_keeps_compressed_is_not_compressed_again(
    cli: Any, daemon: Any, redis_server: Any, prompt: Any
) -> None:
    own = daemon(memory="4MiB", page_size="4KiB", redis=f"unix://{redis_server().socket}")
    with own.client() as client:
        tokens, keys = prompt(3, size=20_000, of=client)
        client.flush()

        def done(verb: str) -> str:
            return str(cli(verb, *of_prompt(tokens), "--tier", "redis", socket=own.socket).out)

        assert done("compress").startswith("compressed 3 objects")
        assert "skipped 3 (already 3)" in done("compress")
        client.clear(tiers=["cpu"])
        assert "skipped 3 (already 3)" in done("compress")  # though no node of ours knows of it
        assert done("decompress").startswith("decompressed 3 objects")
        assert "skipped 3 (already 3)" in done("decompress")
        assert [client.get(key) for key in keys] == [bytes(20_000)] * 3


def test_clear_without_a_terminal_asks_nobody(cli: Any, daemon: Any, prompt: Any) -> None:
    own = daemon(memory="1MiB", page_size="4KiB")
    prompt(2, of=own.client())
    done = cli("clear", "--tier", "disk,cpu", socket=own.socket)
    assert (done.code, done.out) == (DONE, "removed 2 objects (2.9 KiB), skipped 0\n")


@pytest.mark.parametrize("which", [["--model", "whole"], ["--salt", "whose"], ["--model", "whole", "--salt", "whose"]])
def test_a_whole_model_or_tenant_is_not_removed_without_a_yes(cli: Any, prompt: Any, which: list[str]) -> None:
    prompt(2, model="whole", salt="whose")
    refused = cli("evict", *which)
    assert (refused.code, "give --yes" in refused.err) == (2, True)
    assert cli("lookup", *which).code == DONE
    assert cli("evict", *which, "--yes").code == DONE
    assert cli("lookup", *which).code == NOTHING


def test_tokens_are_made_listed_and_forgotten(cli: Any, short_tmp: Path) -> None:
    socket = short_tmp / "lc.sock"  # no daemon is needed
    made = cli("tokens", "add", "grafana", "--role", "read", "--salt", "-", stdin="tenant\n", socket=socket)
    assert (made.code, len(made.out.split())) == (DONE, 1)
    (listed,) = cli("tokens", "list", "--json", socket=socket).json
    assert (listed["name"], listed["role"], listed["tenant"]) == ("grafana", "read", salt_digest("tenant"))
    assert made.out.strip() not in cli("tokens", "list", socket=socket).out
    assert cli("tokens", "remove", "grafana", socket=socket).code == DONE
    again = cli("tokens", "remove", "grafana", socket=socket)
    assert (again.code, "no token is called 'grafana'" in again.err) == (NOTHING, True)


# -- operations --------------------------------------------------------------------------------------------------------


def test_no_wait_prints_the_id_of_what_then_can_be_followed(cli: Any, prompt: Any) -> None:
    tokens, _ = prompt(2)
    for word in (["--no-wait"], ["--wait", 0]):
        begun = cli("admit", *of_prompt(tokens), "--tier", "disk", *word)
        assert begun.code == DONE
        assert re.fullmatch(r"[0-9a-f]{16}\n", begun.out)
    id_ = begun.out.strip()
    assert cli("operations", "show", id_, "--wait", 20).code == DONE
    shown = cli("operations", "show", id_, "--json").json
    assert (shown["id"], shown["verb"], shown["state"]) == (id_, "admit", "done")
    assert f"id       {id_}\nverb     admit\nstate    done\n" in cli("operations", "show", id_).out
    listed = cli("operations", "list", "--json").json
    assert listed[0]["id"] == id_
    assert [row["id"] for row in columns(cli("operations", "list").out)] == [item["id"] for item in listed]
    assert len(cli("operations", "list", "--limit", 1, "--json").json) == 1
    assert cli("operations", "cancel", id_, "--json").json["state"] == "done"  # it had ended before


def test_show_with_wait_exits_as_its_verb_does(cli: Any) -> None:
    id_ = cli("pin", "--key", "ab" * 32, "--no-wait", "--json").json["id"]
    assert cli("operations", "show", id_, "--wait", 20).code == NOTHING
    assert cli("operations", "show", id_).code == DONE


def test_an_operation_that_nobody_knows_is_exit_code_3(cli: Any) -> None:
    for command in ("show", "cancel"):
        done = cli("operations", command, "123")
        assert (done.code, "there is no operation '123'" in done.err) == (NOTHING, True)


def test_a_tier_that_the_daemon_does_not_have_is_exit_code_1(cli: Any, prompt: Any) -> None:
    tokens, _ = prompt(1)
    done = cli("admit", *of_prompt(tokens), "--tier", "redis")
    assert (done.code, done.out) == (REFUSED, "")
    assert "tier 'redis' is not configured here; this daemon has cpu, disk" in done.err


VERBS = ["lookup", "admit", "evict", "pin", "unpin", "compress", "decompress", "objects"]
OTHERS = [["clear"], ["tree"], ["events"], ["config"], ["top", "--once"], ["status"], ["operations", "list"]]


@pytest.mark.parametrize("command", [[verb, "--key", "ab" * 32] for verb in VERBS] + OTHERS, ids=lambda each: each[0])
def test_without_a_daemon_each_verb_is_exit_code_1(cli: Any, command: list[str], short_tmp: Path) -> None:
    done = cli(*command, socket=short_tmp / "lc.sock")
    assert (done.code, done.out) == (REFUSED, "")
    assert f"start one with: loracache serve --socket {short_tmp / 'lc.sock'}" in done.err


def test_the_exit_codes_are_in_the_help(cli: Any) -> None:
    help_ = " ".join(cli("--help").out.split())
    for told in ("0 done", "1 the daemon", "2 wrong usage", "3 nothing found", "4 done in part", "130 interrupted"):
        assert told in help_


def test_every_verb_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs" / "control-api.md").read_text()
    verbs = [command.name or command.callback.__name__ for command in app.registered_commands]  # type: ignore[union-attr]
    groups = [group.name for group in app.registered_groups]
    assert {"status", "evict", "operations"} < {*verbs, *groups}
    assert not [name for name in (*verbs, *groups) if f"`loracache {name}" not in text]
