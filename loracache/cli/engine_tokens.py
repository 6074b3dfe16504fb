# SPDX-License-Identifier: Apache-2.0
"""Asks a running vLLM for a prompt's token ids and for what its models and LoRA adapters are called.

Needs nothing but the standard library: the command line has to start fast.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException
from typing import IO, Any

from loracache.batch.servers import base_url, chat_question, checked_key, token_ids
from loracache.errors import ProtocolError, Rejected, Unavailable, Unknown

__all__ = ["Engine", "Prompt"]

_MOST_BYTES = 64 << 20
_PART = 64 << 10


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a prompt is to its engine. model: its base model's served name. adapter: the LoRA adapter's served name, or
    None where the base model was asked for."""

    model: str
    adapter: str | None
    tokens: list[int]


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect could carry the key to another host."""

    def redirect_request(self, req: Any, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str) -> None:
        return None


class Engine:
    """The OpenAI server of a vLLM at `url`. timeout: seconds for each answer. Methods raise Unavailable where it does
    not answer, Rejected where it refuses, ProtocolError where it answers something else than vLLM does.
    """

    def __init__(self, url: str, key: str = "", timeout: float = 30.0) -> None:
        self._url = base_url(url, "--engine")
        self._key = checked_key(key)
        self._timeout = timeout
        self._opener = urllib.request.build_opener(_NoRedirects)

    def tokenize(self, request: dict[str, Any], model: str = "") -> Prompt:
        """The token ids of {"prompt": text} or {"messages": [...]}. model: a served name of a model or an adapter, ""
        for the first model. Raises Unknown where the engine does not serve it."""
        base, adapter = self._served(model)
        if "prompt" in request:
            asked = {"prompt": request["prompt"], "add_special_tokens": True}
        else:
            asked = chat_question(request)
        answer = self._ask("/tokenize", {"model": adapter or base} | asked)
        return Prompt(base, adapter, token_ids(answer, self._url))

    def _served(self, model: str) -> tuple[str, str | None]:
        """(the base model's served name, the adapter's or None)."""
        cards = self._ask("/v1/models").get("data")
        if not isinstance(cards, list) or not all(map(_is_card, cards)):
            raise ProtocolError(f"{self._url}/v1/models answered no list of models; is it a vLLM server?")
        parents = {str(card["id"]): card.get("parent") for card in cards}
        bases = [name for name, parent in parents.items() if not parent]
        if not bases:
            raise ProtocolError(f"{self._url}/v1/models lists no base model")
        model = model or bases[0]
        if model not in parents:
            known = ", ".join(map(repr, list(parents)[:20]))
            raise Unknown(
                f"the engine at {self._url} serves no model {model[:100]!r}; it serves {known}; an adapter that it has "
                "not loaded yet is given by --adapter"
            )
        parent = parents[model]
        if not parent:
            return model, None
        # An adapter may be loaded with any text as its base model's name; the engine's own is what was registered.
        return (parent if parent in bases else bases[0]), model

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        request = urllib.request.Request(self._url + path, data, headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                text = self._read(response)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(path, error) from None
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise self._silent() from None
            raise Unavailable(
                f"no engine answers at {self._url} ({reason}); give --engine its http://HOST:PORT"
            ) from None
        except HTTPException:
            raise ProtocolError(f"{self._url}{path} did not answer in HTTP; is it a vLLM server?") from None
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise ProtocolError(f"{self._url}{path} answered no JSON object; is it a vLLM server?")
        return answer

    def _read(self, response: Any) -> bytes:
        """The whole body, in as much time as the whole answer may take."""
        deadline = time.monotonic() + self._timeout
        found = bytearray()
        while part := response.read1(_PART):
            found += part
            if len(found) > _MOST_BYTES:
                raise ProtocolError(f"{self._url} answered more than {_MOST_BYTES >> 20} MiB; is it a vLLM server?")
            if time.monotonic() > deadline:
                raise self._silent()
        return bytes(found)

    def _silent(self) -> Unavailable:
        return Unavailable(
            f"the engine at {self._url} did not answer within {self._timeout:g} s; --engine-timeout gives it longer"
        )

    def _refused(self, path: str, error: urllib.error.HTTPError) -> Rejected:
        if error.code in (401, 403):
            key = "does not take the key it was given" if self._key else "wants an API key"
            return Rejected(
                f"the engine at {self._url} {key} ({error.code}); set VLLM_API_KEY or give --engine-key-file"
            )
        if error.code == 404:
            return Rejected(
                f"{self._url}{path} is not there (404: {_reason(error)}); give --engine the address of a vLLM server"
            )
        return Rejected(f"{self._url}{path} refused with {error.code}: {_reason(error)}")


def _is_card(value: object) -> bool:
    """Whether it is one of the models that /v1/models lists."""
    if not isinstance(value, dict):
        return False
    name, parent = value.get("id"), value.get("parent")
    return isinstance(name, str) and bool(name) and (parent is None or isinstance(parent, str))


def _reason(error: urllib.error.HTTPError) -> str:
    """What the engine says is wrong, in one short line."""
    try:
        text = error.read(_PART).decode(errors="replace")
    except OSError:
        return str(error.reason)
    try:
        found = json.loads(text)
        told = found.get("error", found)
        text = str(told["message"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    line = " ".join(text.split())[:300] or str(error.reason)
    return "".join(each if each.isprintable() else "?" for each in line)
