# SPDX-License-Identifier: Apache-2.0
"""Redis servers on loopback, plain and by TLS, alone and as a cluster, and the certificates they show."""

from __future__ import annotations

import os
import random
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis as redis_client

_CURVE = ("ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
_chosen = random.Random()
_given: set[int] = set()
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 8  # those beside us choose others
_PORTS = (10_000 + 1500 * _worker, 11_500 + 1500 * _worker)  # and 10000 above still below those of outgoing connections


class Certificates:
    """A CA and what it signs, made by openssl in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.ca = self._make("ca", "-subj", "/CN=test CA", "-addext", "keyUsage=critical,keyCertSign,cRLSign")
        self.stranger = self._make("stranger", "-subj", "/CN=other CA")

    def signed(self, name: str, alternative: str = "DNS:localhost,IP:127.0.0.1", days: int = 2) -> tuple[Path, Path]:
        """Certificate and key of a server or client known under the `alternative` names; expired where days < 0."""
        key, request, certificate = (self._folder / f"{name}.{end}" for end in ("key", "csr", "crt"))
        extensions = self._folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={alternative}\n")
        self._openssl("req", "-newkey", *_CURVE, "-nodes", "-keyout", key, "-out", request, "-subj", "/CN=test")
        self._openssl(
            "x509", "-req", "-in", request, "-CA", self.ca, "-CAkey", self._folder / "ca.key", "-CAcreateserial",
            "-days", days, "-extfile", extensions, "-out", certificate,
        )  # fmt: skip
        return certificate, key

    def locked(self, key: Path, password: str) -> Path:
        """The same key under a password."""
        locked = key.with_suffix(".locked")
        self._openssl("pkey", "-in", key, "-aes256", "-passout", f"pass:{password}", "-out", locked)
        return locked

    def _make(self, name: str, *options: str) -> Path:
        key, certificate = self._folder / f"{name}.key", self._folder / f"{name}.crt"
        self._openssl(
            "req", "-x509", "-newkey", *_CURVE, "-nodes", "-days", 2, "-keyout", key, "-out", certificate, *options
        )
        return certificate

    def _openssl(self, *arguments: object) -> None:
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, cwd=self._folder)


class NetServer:
    """A redis-server on loopback ports of its own, with nothing kept on disk."""

    def __init__(
        self,
        folder: Path,
        *options: object,
        tls: tuple[Path, Path] | None = None,
        ca: Path | None = None,
        password: str | None = None,
    ) -> None:
        self.port = free_port()
        self.tls_port = free_port() if tls else 0
        self._folder = folder / str(self.port)
        self._folder.mkdir()
        self._arguments = ["--port", self.port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._arguments += ["--repl-diskless-sync-delay", 0, *options]
        if tls:
            self._arguments += ["--tls-port", self.tls_port, "--tls-cert-file", tls[0], "--tls-key-file", tls[1]]
            self._arguments += ["--tls-ca-cert-file", ca]
        self.url = f"redis://127.0.0.1:{self.port}"
        self.tls_url = f"rediss://localhost:{self.tls_port}?ssl_ca_certs={ca}"
        if password:
            self._arguments += ["--requirepass", password, "--masterauth", password]
        self.redis = redis_client.Redis(port=self.port, password=password)
        self.start()

    def start(self) -> None:
        command = ["redis-server", *map(str, self._arguments)]
        self.process = subprocess.Popen(command, cwd=self._folder, stdout=subprocess.DEVNULL)

    def answers(self) -> bool:
        assert self.process.poll() is None, f"redis-server ended with {self.process.returncode}"
        try:
            return bool(self.redis.ping())
        except redis_client.ConnectionError:
            return False

    def kill(self) -> None:
        self.redis.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)


def free_port() -> int:
    """A port nobody listens on, nor on the one 10000 above, which a cluster's nodes speak among themselves by. Each is
    given once: a server that was just started does not listen yet.
    """
    while True:
        port = _chosen.randrange(*_PORTS)
        if port in _given:
            continue
        _given.add(port)
        try:
            with socket.create_server(("127.0.0.1", port)), socket.create_server(("127.0.0.1", port + 10_000)):
                return port
        except OSError:
            continue


class NetCluster:
    """Three nodes with a third of the slots each, reached plainly and by TLS."""

    def __init__(self, folder: Path, certificates: Certificates, eventually: Callable[..., Any]) -> None:
        self._eventually = eventually
        options = ["--cluster-enabled", "yes", "--cluster-node-timeout", 1000, "--cluster-require-full-coverage", "no"]
        options += ["--tls-cluster", "yes", "--tls-replication", "yes", "--tls-auth-clients", "no"]
        pair = certificates.signed("node")
        self.new_node: Callable[[], NetServer] = lambda: NetServer(folder, *options, tls=pair, ca=certificates.ca)
        self.nodes = [self.new_node() for _ in range(3)]
        self.url = "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        self.tls_url = self.url.replace("redis", "rediss", 1) + f"?ssl_ca_certs={certificates.ca}"
        for plain, tls in ((node.port, node.tls_port) for node in self.nodes):
            self.tls_url = self.tls_url.replace(f":{plain}", f":{tls}")

    def join(self) -> NetCluster:
        """Makes the nodes one cluster."""
        for number, node in enumerate(self.nodes):
            self._eventually(node.answers, "a node answers")
            node.redis.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
            node.redis.execute_command("CLUSTER ADDSLOTS", *range(number * 16384 // 3, (number + 1) * 16384 // 3))
        for node in self.nodes[1:]:
            node.redis.execute_command("CLUSTER MEET", "127.0.0.1", self.nodes[0].tls_port)
        self._eventually(self.whole, "the cluster is whole")
        return self

    def whole(self) -> bool:
        """Whether every node knows of all slots and nodes."""
        states = [node.redis.execute_command("CLUSTER INFO") for node in self.nodes]
        return all(
            state["cluster_state"] == "ok"
            and (state["cluster_slots_ok"], state["cluster_known_nodes"]) == ("16384", "3")
            for state in states
        )

    def agreed(self) -> bool:
        """Whether all nodes name the same owners, by claims of the same age. A node that takes a slot before it has
        heard of the last such claim makes one that is no newer, and the others may then give the slot back.
        """
        told = [node.redis.execute_command("CLUSTER SLOTS") for node in self.nodes]
        owners = [sorted((first, last, master[1]) for first, last, master, *_ in ranges) for ranges in told]
        epochs = [node.redis.execute_command("CLUSTER INFO")["cluster_current_epoch"] for node in self.nodes]
        return all(each == owners[0] for each in owners) and len(set(epochs)) == 1

    def owner(self, slot: int) -> int:
        """The number of the node that says it has the slot."""
        for number, node in enumerate(self.nodes):
            for first, last, (_, port, *_), *_ in node.redis.execute_command("CLUSTER SLOTS"):
                if first <= slot <= last and port == node.port:
                    return number
        raise AssertionError(f"nobody has slot {slot}")

    def move(self, slot: int, to: int) -> None:
        """Moves a slot and what is in it, as `redis-cli --cluster reshard` does."""
        source, target = self.nodes[self.owner(slot)].redis, self.nodes[to].redis
        self.begin_move(slot, to)
        while keys := source.execute_command("CLUSTER GETKEYSINSLOT", slot, 100):
            source.execute_command("MIGRATE", "127.0.0.1", self.nodes[to].tls_port, "", 0, 5000, "KEYS", *keys)
        for node in (target, source):
            node.execute_command("CLUSTER SETSLOT", slot, "NODE", self.id(to))
        self._eventually(self.agreed, "the nodes agree on who has the slots")

    def begin_move(self, slot: int, to: int) -> None:
        """From now on the keys of the slot that are not there are asked for at the other node."""
        source = self.owner(slot)
        self.nodes[to].redis.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", self.id(source))
        self.nodes[source].redis.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", self.id(to))

    def end_move(self, slot: int) -> None:
        """Has a slot stay where it is."""
        for node in self.nodes:
            node.redis.execute_command("CLUSTER SETSLOT", slot, "STABLE")

    def id(self, number: int) -> str:
        return str(self.nodes[number].redis.execute_command("CLUSTER MYID").decode())

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()


class Content:
    """All keys of a server or cluster that is reached by `url`. It is emptied before its use and after."""

    def __init__(self, url: str, nodes: list[Any]) -> None:
        self.url = url
        self.nodes = nodes
        first = nodes[0].connection_pool.connection_kwargs
        self.redis = nodes[0] if len(nodes) == 1 else redis_client.RedisCluster("127.0.0.1", first["port"])

    def all_keys(self) -> list[bytes]:
        return [key for node in self.nodes for key in node.keys("*")]

    def leave_room(self, nbytes: int) -> None:
        """Refuse what takes more than so many bytes on any node."""
        for node in self.nodes:
            node.config_set("maxmemory-policy", "noeviction")
            node.config_set("maxmemory", node.info("memory")["used_memory"] + nbytes)

    def __enter__(self) -> None:
        self._empty()

    def __exit__(self, *_: object) -> None:
        self._empty()
        if len(self.nodes) > 1:
            self.redis.close()

    def _empty(self) -> None:
        for node in self.nodes:
            node.config_set("maxmemory", 0)
            node.flushall()
