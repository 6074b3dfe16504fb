# SPDX-License-Identifier: Apache-2.0
"""`loracache adapters ...` as a user runs it, against a real daemon."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loracache import CacheClient, Namespace
from loracache.adapters.payload import adapter_digest
from loracache.wire import protocol

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
M = "base_model.model.model.layers.0"


def peft(folder: Path, seed: int = 0, *, width: int = 64, **settings: Any) -> Path:
    """A PEFT folder with tensors of two shapes and dtypes, and a configuration that nobody would write like that."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"v_proj": 2}, "note": "größer\t "}
    (folder / CONFIG).write_text(json.dumps(config | settings, indent=3, ensure_ascii=False) + "\n\n")
    numbers = np.random.default_rng(seed)
    tensors = {
        f"{M}.{module}.lora_{part}.weight": numbers.standard_normal(shape).astype(dtype)
        for module, rank, dtype in (("q_proj", 4, np.float32), ("v_proj", 2, np.float16))
        for part, shape in (("A", (rank, width)), ("B", (width // 2, rank)))
    }
    save_file(tensors, folder / WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def disk_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def running(module_daemon: Any, disk_path: Path) -> Any:
    return module_daemon(memory="8MiB", page_size="4KiB", disk_path=disk_path)


@pytest.fixture
def client(running: Any) -> Iterator[CacheClient]:
    with CacheClient(running.url) as made:
        yield made


@pytest.fixture
def run(running: Any, loracache: Any) -> Any:
    """run(command, ...) runs it on the daemon, which succeeds; answers what it printed."""

    def made(*arguments: object) -> Any:
        code, out, err = loracache("adapters", *arguments, socket=running.socket)
        assert (code, err) == (0, "")
        return out

    return made


@pytest.fixture
def fails(running: Any, loracache: Any) -> Any:
    """fails(command, ...) runs it on the daemon, which refuses with exit code `code`; answers its message."""

    def made(*arguments: object, code: int = 1) -> Any:
        ended, out, err = loracache("adapters", *arguments, "--socket", running.socket)
        assert (ended, out) == (code, "")
        assert err.startswith("loracache: ")
        assert "Traceback" not in err
        return err

    return made


def store_kv(client: CacheClient, adapter: str) -> list[bytes]:
    keys = [os.urandom(32) for _ in range(3)]
    root = client.register(Namespace("model", "float32", "layout", 16, adapter=adapter))
    with client.reserve(root, keys, [2048] * 3) as reservation:
        for position in range(3):
            reservation.write(position, bytes(2048))
    return keys


# -- what they do ------------------------------------------------------------------------------------------------------


def test_add_takes_a_folder_in_says_its_digest_and_has_it_on_disk_when_it_ends(
    run: Any, disk_path: Path, tmp_path: Path
) -> None:
    folder = peft(tmp_path / "one", 1)
    digest = adapter_digest(str(folder))
    assert run("add", "tenant/added", folder) == f"tenant/added -> {digest}\n"
    assert (disk_path / "objects" / digest[:2] / digest).exists()
    other = peft(tmp_path / "other", 2)
    moved = run("add", "tenant/added", os.path.relpath(other)).split()[-1]  # of the command's folder, not the daemon's
    assert moved == adapter_digest(str(other))
    assert f"digest   {moved}" in run("show", "tenant/added")


def test_list_shows_all_names_as_a_table_and_as_json(client: CacheClient, run: Any, tmp_path: Path) -> None:
    folder = peft(tmp_path / "one", 3)
    digest = client.add_adapter(str(folder), "z-last")
    client.add_adapter(str(folder), "listed")
    store_kv(client, digest)
    client.flush()
    client.connection.call(protocol.Resident(bytes.fromhex(digest)), 10)
    table, text = run("list"), run("list", "--json")
    wanted = [adapter.name for adapter in client.adapters()]
    listed = {adapter["name"]: adapter for adapter in json.loads(text)}
    assert list(listed) == wanted == sorted(wanted)
    assert {"listed", "z-last"} <= set(wanted)
    adapter = listed["listed"]
    assert (adapter["digest"], adapter["tiers"], adapter["engines"]) == (digest, ["gpu", "cpu", "disk"], 1)
    assert adapter["kv"] == {"cpu": [3, 6144], "disk": [3, 6144]}
    assert adapter["config"] == (folder / CONFIG).read_text()
    (row,) = [line for line in table.splitlines() if line.startswith("listed ")]
    for word in (digest, "gpu, cpu, disk", " 3 ", "6.0 KiB", f"{adapter['size'] / 1024:.1f} KiB"):
        assert word in row


def test_an_empty_cache_lists_nothing(daemon: Any, loracache: Any) -> None:
    assert loracache("adapters", "list", "--json", "--socket", daemon(memory="1MiB").socket) == (0, "[]\n", "")


def test_show_tells_one_adapter_by_name_and_by_digest(client: CacheClient, run: Any, tmp_path: Path) -> None:
    began = time.time()
    digest = client.add_adapter(str(peft(tmp_path / "one", 4)), "shown")
    store_kv(client, digest)
    shown = json.loads(run("show", "shown", "--json"))
    assert (shown["name"], shown["digest"], shown["engines"]) == ("shown", digest, 0)
    assert began - 1 <= shown["added"] <= time.time() + 1
    text = run("show", "shown")
    added = time.strftime("%Y-%m-%d %H:%M", time.localtime(shown["added"]))
    for line in (f"digest   {digest}", f"added    {added}", "engines  0", "KV       3 objects, 6.0 KiB in cpu"):
        assert line in text
    assert text.startswith("name     shown\n")
    assert json.loads(text[text.index("{") :])["note"] == "größer\t "
    by_digest = run("show", digest)
    assert "name     -\n" in by_digest
    assert f"digest   {digest}" in by_digest


def test_remove_forgets_a_name_and_says_what_left(client: CacheClient, run: Any, tmp_path: Path) -> None:
    folder = str(peft(tmp_path / "one", 5))
    digest = client.add_adapter(folder, "once")
    client.add_adapter(folder, "twice")
    keys = store_kv(client, digest)
    client.flush()
    shown = client.show_adapter("twice")
    assert shown is not None
    assert run("remove", "once") == "removed once: 0 objects (0 bytes), skipped 0\n"
    assert client.find_adapter("twice") == digest
    assert run("remove", "twice") == f"removed twice: 8 objects ({2 * (shown.size + 6144)} bytes), skipped 0\n"
    assert client.find_adapter("twice") is None
    assert client.lookup([bytes.fromhex(digest)]).hits == client.lookup(keys).hits == 0


@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_export_gives_equal_tensors_and_the_same_configuration(
    client: CacheClient, run: Any, tmp_path: Path, tier: str
) -> None:
    folder = peft(tmp_path / "one", 6, width=4000)
    digest = client.add_adapter(str(folder), "exported")
    client.flush()
    if tier == "disk":
        client.evict([bytes.fromhex(digest)], tiers=["cpu"])
    out = tmp_path / "deep" / "out"
    assert run("export", "exported", out) == f"exported -> {out}\n"
    assert sorted(path.name for path in out.iterdir()) == [CONFIG, WEIGHTS]
    assert list(out.parent.iterdir()) == [out]
    assert (out / CONFIG).read_bytes() == (folder / CONFIG).read_bytes()
    given, back = load_file(folder / WEIGHTS), load_file(out / WEIGHTS)
    assert given.keys() == back.keys()
    for name, tensor in given.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert back[name].tobytes() == tensor.tobytes()
    assert adapter_digest(str(out)) == digest
    if tier == "disk":
        by_digest = tmp_path / "by digest"
        run("export", digest, by_digest)
        assert adapter_digest(str(by_digest)) == digest


# -- what they refuse --------------------------------------------------------------------------------------------------


def test_a_name_that_nobody_knows_is_refused_with_what_to_do(fails: Any, tmp_path: Path) -> None:
    for command in (("show", "1" * 64), ("remove", "nobody"), ("export", "nobody", tmp_path / "out")):
        assert f"no adapter is called {command[1]!r}; see: loracache adapters list" in fails(*command, code=3)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_added_is_refused_with_its_reason(run: Any, fails: Any, tmp_path: Path) -> None:
    assert "1 to 200 of letters, digits" in fails("add", "no name", peft(tmp_path / "one"))
    assert f"{tmp_path}/nowhere/{CONFIG}' cannot be read: No such file" in fails("add", "refused", tmp_path / "nowhere")
    assert "use_dora=True is not supported" in fails("add", "refused", peft(tmp_path / "dora", use_dora=True))
    assert '"refused"' not in run("list", "--json")


def test_an_export_replaces_nothing(client: CacheClient, fails: Any, tmp_path: Path) -> None:
    client.add_adapter(str(peft(tmp_path / "one", 7)), "precious")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in ("empty", "link", "one"):
        message = fails("export", "precious", tmp_path / place)
        assert f"{tmp_path / place} cannot be written: it exists; give a folder that is not there" in message
    assert "cannot be written" in fails("export", "precious", tmp_path / "file" / "below")
    assert list((tmp_path / "empty").iterdir()) == []
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "link", "one"]


def test_an_adapter_that_no_tier_has_any_more_is_not_exported(daemon: Any, loracache: Any, tmp_path: Path) -> None:
    """Its disk was emptied by hand while the daemon was down."""
    disk = tmp_path / "disk"
    first = daemon(memory="1MiB", disk_path=disk)
    assert loracache("adapters", "add", "lost", peft(tmp_path / "one"), "--socket", first.socket)[0] == 0
    first.stop()
    for path in (disk / "objects").glob("*/*"):
        path.unlink()
    (disk / "manifest").unlink()
    again = daemon(memory="1MiB", disk_path=disk)
    code, _, err = loracache("adapters", "export", "lost", tmp_path / "out", "--socket", again.socket)
    assert code == 1
    assert "lost is in no tier any more" in err
    assert not (tmp_path / "out").exists()
    assert loracache("adapters", "add", "lost", tmp_path / "one", "--socket", again.socket)[0] == 0
    assert loracache("adapters", "export", "lost", tmp_path / "out", "--socket", again.socket)[0] == 0


COMMANDS = {"add": ("a", "."), "list": (), "show": ("a",), "remove": ("a",), "export": ("a", "out")}


@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_daemon_a_command_says_so(command: str, loracache: Any, short_tmp: Path) -> None:
    code, out, err = loracache("adapters", command, *COMMANDS[command], "--socket", short_tmp / "lc.sock")
    assert (code, out) == (1, "")
    assert f"start one with: loracache serve --socket {short_tmp / 'lc.sock'}" in err


def test_wrong_usage_is_exit_code_2(loracache: Any) -> None:
    for arguments, said in ((["list"], "give --socket PATH or set LORACACHE_SOCKET"), (["add", "a"], "Usage")):
        code, out, err = loracache("adapters", *arguments)
        assert (code, out) == (2, "")
        assert said in err
        assert "Traceback" not in err


def test_a_name_is_given_a_priority(run: Any, fails: Any, tmp_path: Path) -> None:
    run("add", "ranked", peft(tmp_path / "ranked"), "--priority", "high")
    assert "priority high" in run("show", "ranked").splitlines()
    assert run("prioritize", "ranked", "low") == "ranked: low\n"
    assert json.loads(run("show", "ranked", "--json"))["priority"] == "low"
    assert "no adapter is called 'nobody'" in fails("prioritize", "nobody", "low", code=3)
    run("remove", "ranked")
