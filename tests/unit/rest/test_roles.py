# SPDX-License-Identifier: Apache-2.0
"""What each role may do, and that a route which does not say what it needs is closed."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, WebSocketRoute

from loracache.rest.access import Access
from loracache.rest.app import make_app
from loracache.rest.limits import Limits, Rates
from loracache.rest.problems import install
from loracache.rest.roles import Needs, guard, needs, needs_of
from loracache.rest.tokens import RANKS, Principal, TokenStore, add_token, tokens_path

TENANT = "ab" * 32
WHO: dict[str, tuple[Any, str]] = {
    "reader": ("read", ""), "operator": ("operate", ""), "chief": ("admin", ""),
    "tenant": ("operate", TENANT), "reading-tenant": ("read", TENANT),
}  # fmt: skip


def routes() -> list[tuple[str, str, Needs]]:
    """Method, path, what it needs, of everything there is."""
    app = make_app("unix:///nowhere")
    return [
        (method, route.path, needs_of(app, route))  # type: ignore[attr-defined]
        for route in app.routes
        for method in sorted(getattr(route, "methods", None) or ["GET"])
        if method != "HEAD"
    ]


EXPECTED = {
    "none": {"GET /healthz", "GET /readyz", "GET /", "GET /assets/{}"},
    "read": {"GET *", "POST /v1/lookup"},
    "operate": {
        "POST /v1/admit", "POST /v1/evict", "POST /v1/pin", "POST /v1/unpin", "POST /v1/move", "POST /v1/compress",
        "POST /v1/decompress", "POST /v1/flush", "DELETE /v1/operations/{}",
    },
    "admin": {"POST /v1/clear", "PUT /v1/adapters/{}", "POST /v1/adapters/{}", "DELETE /v1/adapters/{}",
              "GET /v1/config", "PUT /v1/quotas", "DELETE /v1/quotas"},
}  # fmt: skip
SALTED = {"lookup", "admit", "evict", "pin", "unpin", "move", "compress", "decompress", "objects", "tree", "operations",
          "quotas"}  # fmt: skip


@pytest.mark.parametrize(("method", "path", "need"), routes(), ids=lambda part: part if isinstance(part, str) else "")
def test_every_route_says_what_it_needs_and_it_is_the_right_thing(method: str, path: str, need: Needs) -> None:
    route = f"{method} {re.sub(r'{[^}]*}', '{}', path)}"
    (role,) = [role for role, known in EXPECTED.items() if route in known] or ["read"] * (method == "GET")
    assert need.role == role
    assert not need.tenants or path.split("/")[2] in SALTED
    assert need.upload == (route == "PUT /v1/adapters/{}")
    assert need.endless == (path == "/v1/events")


def test_no_api_route_is_left_to_the_default() -> None:
    app = make_app("unix:///nowhere")
    silent = [
        route.path
        for route in app.routes
        if isinstance(route, APIRoute) and not any(isinstance(d.call, Needs) for d in route.dependant.dependencies)
    ]
    assert silent == []


@pytest.fixture(scope="module")
def tokens(running: Any, eventually: Any) -> dict[str, str]:
    """By whom they are for; "anonymous" has none."""
    path = tokens_path(running.socket)
    made = {name: add_token(path, name, role, tenant) for name, (role, tenant) in WHO.items()}
    last = {"authorization": f"Bearer {made['reading-tenant']}"}
    eventually(lambda: httpx.get(f"{running.http}/v1/stats", headers=last).status_code != 401, "tokens are known")
    made["daemon"] = Path(f"{running.socket}.token").read_text().strip()
    return made


@pytest.mark.parametrize("who", ["anonymous", "daemon", *WHO])
def test_every_role_gets_what_it_may_and_nothing_else(
    running: Any, tokens: dict[str, str], anybody: httpx.Client, who: str
) -> None:
    role, tenant = WHO.get(who, ("admin", "") if who == "daemon" else ("read", ""))
    headers = {"authorization": f"Bearer {tokens[who]}"} if who in tokens else {}
    for method, path, need in routes():
        # A body that is not a JSON shows who gets as far as to have it read.
        with anybody.stream(
            method,
            re.sub(r"{[^}]*}", "nobody", path),
            headers=headers | {"content-type": "application/json"},
            content=None if method in ("GET", "DELETE") else b"{",
        ) as answer:
            if not need.endless or answer.status_code != 200:
                answer.read()
        if need.endless and answer.status_code == 200:
            assert RANKS[role] >= RANKS[need.role]
            assert not tenant
            continue
        what = f"{method} {path} by {who}: {answer.text}"
        if need.role == "none" or (RANKS[role] >= RANKS[need.role] and (not tenant or need.tenants)):
            assert answer.status_code not in (401, 403), what
            continue
        assert answer.status_code == (401 if who == "anonymous" else 403), what
        assert ("www-authenticate" in answer.headers) == (answer.status_code == 401)
        problem = answer.json()
        assert problem["status"] == answer.status_code
        assert need.role in problem["detail"]
        assert f"loracache tokens add NAME --role {need.role}" in problem["detail"]
        assert not [token for token in tokens.values() if token in answer.text]


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Basic {}", "Digest {}", "{}", "Bearer {}x", "Bearer x{}", "Bearer {} {}",
     "Bearer\t{}", "Bearer={}", "Bearer " + "x" * 5000, "Bearer ü{}", "Bearer token={}", "Bearer daemon"],
)  # fmt: skip
def test_whoever_shows_a_wrong_token_is_told_so_even_where_none_is_needed(
    running: Any, tokens: dict[str, str], anybody: httpx.Client, header: str
) -> None:
    headers: Any = {"authorization": header.format(*[tokens["chief"]] * 2).encode()}
    for method, path in (("GET", "/v1/stats"), ("GET", "/metrics"), ("POST", "/v1/clear"), ("POST", "/v1/evict")):
        answer = anybody.request(method, path, headers=headers)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert tokens["chief"] not in answer.text
    assert anybody.get("/healthz", headers=headers).status_code == 200


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
def test_the_schemes_name_has_no_case(tokens: dict[str, str], anybody: httpx.Client, scheme: str) -> None:
    headers = {"authorization": f"{scheme} {tokens['operator']}"}
    assert anybody.post("/v1/unpin", json={}, headers=headers).status_code == 422


@pytest.mark.parametrize("where", ["?token={}", "?access_token={}", "?authorization=Bearer%20{}", "cookie"])
def test_a_token_counts_in_its_header_alone(tokens: dict[str, str], anybody: httpx.Client, where: str) -> None:
    query = where.format(tokens["chief"]) if where != "cookie" else ""
    headers = {} if query else {"cookie": f"token={tokens['chief']}; authorization=Bearer {tokens['chief']}"}
    assert anybody.post(f"/v1/clear{query}", json={}, headers=headers).status_code == 401


# -- an application of their own ----------


def called(app: FastAPI, store: TokenStore, *calls: tuple[str, str, str]) -> list[httpx.Response]:
    """Answers to (method, path, token)."""
    access = Access(app, frozenset({"here"}), store, Rates(0), open_reading=True)

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(access), base_url="http://here") as client:
            return [
                await client.request(method, path, headers={"authorization": f"Bearer {token}"} if token else {})
                for method, path, token in calls
            ]

    return asyncio.run(ask())


@pytest.fixture
def store(tmp_path: Path) -> tuple[TokenStore, dict[str, str]]:
    path = tokens_path(tmp_path / "lc.sock")
    made = {name: add_token(path, name, role, tenant) for name, (role, tenant) in WHO.items()}
    return TokenStore(tmp_path / "lc.sock"), made


def statuses(app: FastAPI, store: tuple[TokenStore, dict[str, str]], method: str, path: str) -> dict[str, int]:
    who = ["", *store[1]]
    answers = called(app, store[0], *[(method, path, store[1].get(name, "")) for name in who])
    return {name: answer.status_code for name, answer in zip(who, answers, strict=True)}


ADMIN_ALONE = {"": 401, "reader": 403, "operator": 403, "chief": 200, "tenant": 403, "reading-tenant": 403}


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
def test_a_route_that_says_nothing_needs_an_admin(store: tuple[TokenStore, dict[str, str]], method: str) -> None:
    app = FastAPI()
    install(app)

    @app.api_route("/new", methods=[method])
    async def new() -> str:
        return ""

    guard(app, Limits())
    assert statuses(app, store, method, "/new") == ADMIN_ALONE


def test_so_do_mounts_and_plain_routes_unless_their_need_is_given(store: tuple[TokenStore, dict[str, str]]) -> None:
    app = FastAPI()
    install(app)
    app.router.routes.append(Mount("/closed", PlainTextResponse("")))
    app.router.routes.append(Mount("/pages", PlainTextResponse("")))
    app.add_route("/plain", lambda request: PlainTextResponse(""), methods=["POST"])
    guard(app, Limits(), {"/pages": Needs("none")})
    assert statuses(app, store, "GET", "/closed/x") == statuses(app, store, "POST", "/plain") == ADMIN_ALONE
    assert set(statuses(app, store, "GET", "/pages/x").values()) == {200}


def test_what_cannot_be_guarded_is_refused_when_the_application_is_made() -> None:
    app = FastAPI()
    app.router.routes.append(WebSocketRoute("/ws", lambda websocket: None))
    with pytest.raises(TypeError, match="cannot be guarded"):
        guard(app, Limits())
    twice = FastAPI()
    router = APIRouter(dependencies=[needs("read")])
    router.add_api_route("/x", lambda: "", dependencies=[needs("admin")])
    twice.include_router(router)
    with pytest.raises(ValueError, match="/x says twice what it needs"):
        guard(twice, Limits())


@pytest.mark.parametrize("guarded", [True, False])
def test_a_tenants_token_reaches_what_is_restricted_to_its_salt_and_the_route_knows_whose_it_is(
    store: tuple[TokenStore, dict[str, str]], guarded: bool
) -> None:
    app = FastAPI()
    install(app)

    @app.post("/salted")
    async def salted(who: Annotated[Principal, needs("operate", tenants=True)]) -> dict[str, str]:
        return {"name": who.name, "role": who.role, "tenant": who.tenant}

    @app.post("/whole", dependencies=[needs("operate")])
    async def whole() -> str:
        return ""

    if guarded:
        guard(app, Limits())
    assert statuses(app, store, "POST", "/salted") == ADMIN_ALONE | {"operator": 200, "tenant": 200}
    assert statuses(app, store, "POST", "/whole") == ADMIN_ALONE | {"operator": 200}
    (answer,) = called(app, store[0], ("POST", "/salted", store[1]["tenant"]))
    assert answer.json() == {"name": "tenant", "role": "operate", "tenant": TENANT}


def test_no_websocket_is_spoken(running: Any, anybody: httpx.Client) -> None:
    headers = {"upgrade": "websocket", "connection": "upgrade", "sec-websocket-version": "13",
               "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA=="}  # fmt: skip
    assert anybody.get("/v1/nowhere", headers=headers).status_code == 404
