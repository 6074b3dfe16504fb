# SPDX-License-Identifier: Apache-2.0
"""What a plan asks a running engine: how much KV it has, and a prompt's token ids."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

import numpy as np

from loracache.batch.bodies import given_tokens, question, text_tokens
from loracache.batch.http import Server
from loracache.batch.lines import Line
from loracache.batch.servers import token_ids
from loracache.errors import ProtocolError, Rejected, Unavailable
from loracache.keys import TokenArray, token_array

__all__ = ["By", "Engine", "Facts", "ask_all", "ask_one"]

_Said = TypeVar("_Said")

_ASK_S = 60.0
_MOST_BLOCKS, _MOST_BLOCK = 1 << 36, 4096  # of KV, and tokens of one, that an engine may say
_INFO = re.compile(r"^vllm:cache_config_info\{(.*)\} ", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_NO_SUCH_PATH = (404, 405, 501)


class By(Enum):
    """What a plan goes by: tokens of the engine's own tokenizer, or four bytes of text for each."""

    TOKENS = "tokens"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class Facts:
    """kv_tokens: room for KV, in tokens; block_tokens: of a block of it. None where the engine does not say."""

    kv_tokens: int | None
    block_tokens: int | None


class Engine:
    """An OpenAI server that may be vLLM's. Raises Unavailable where it does not answer, Rejected where it refuses."""

    def __init__(self, server: Server, by: By = By.TOKENS) -> None:
        self.server = server
        self.by = by
        """TEXT from the first time on that the server turns out to tokenize nothing."""
        self.there = True
        """Whether it answered when it was asked last; kept by those who ask."""

    async def facts(self) -> Facts:
        """Of vLLM's metrics; of any other server nothing."""
        models = await self.server.get("/v1/models", _ASK_S)
        if models.status in (401, 403):
            raise Rejected(f"{self.server.url} refuses the API key ({models.status}); set VLLM_API_KEY")
        if models.status >= 500:  # a proxy answers for an engine that is not there yet
            raise Unavailable(f"{self.server.url}/v1/models answered {models.status}")
        if models.status != 200:
            raise Rejected(f"{self.server.url}/v1/models answered {models.status}; is it an OpenAI server?")
        metrics = await self.server.get("/metrics", _ASK_S)
        found = [dict(_LABEL.findall(labels)) for labels in _INFO.findall(str(metrics.body))]
        try:
            sizes = [(int(each["num_gpu_blocks"]), int(each["block_size"])) for each in found]
        except (KeyError, ValueError):
            sizes = []
        if not sizes or not all(1 < count <= _MOST_BLOCKS and 0 < size <= _MOST_BLOCK for count, size in sizes):
            return Facts(None, None)
        return Facts(sum((count - 1) * size for count, size in sizes), sizes[0][1])  # block 0 never holds KV

    async def base_model(self) -> str:
        """What the base model is served as. Raises ProtocolError where the engine lists none."""
        answer = await self.server.get("/v1/models", _ASK_S)
        cards = answer.body.get("data") if isinstance(answer.body, dict) else None
        names = [card.get("id") for card in cards or () if isinstance(card, dict) and not card.get("parent")]
        if not names or not isinstance(names[0], str):
            raise ProtocolError(f"{self.server.url}/v1/models lists no base model")
        return names[0]

    async def tokens(self, line: Line) -> TokenArray:
        """The prompt's token ids; of one that cannot be had as tokens, four bytes of text for each."""
        given = given_tokens(line)
        if given is not None:
            return token_array(given)
        asked = question(line) if self.by is By.TOKENS else None
        if asked is None:
            return text_tokens(line)
        try:
            answer = await self.server.post("/tokenize", asked, _ASK_S)
            if answer.status == 200:
                return np.asarray(token_ids(answer.body, self.server.url), np.int32)
            tokenizes = answer.status not in _NO_SUCH_PATH or isinstance(_told(answer.body), str)
        except ProtocolError:  # no HTTP, or a page of a proxy's
            tokenizes = False
        if not tokenizes:
            self.by = By.TEXT
        return text_tokens(line)  # the engine will say what is wrong with it when it is sent


async def ask_all(engines: Sequence[Engine], ask: Callable[[Engine], Awaitable[_Said]]) -> list[_Said]:
    """What those say that are there and answer as they should. Raises what the last of them raised where none does, and
    what else `ask` raises."""
    said: list[_Said] = []
    told: Unavailable | ProtocolError | None = None
    for engine in engines:
        try:
            said.append(await ask(engine))
            engine.there = True
        except (Unavailable, ProtocolError) as error:
            engine.there, told = False, error
    if told is not None and not said:
        raise told
    return said


async def ask_one(engines: Sequence[Engine], ask: Callable[[Engine], Awaitable[_Said]]) -> _Said:
    """What the first says that is there. Raises as `ask_all`."""
    for engine in engines:
        if engine.there:
            with contextlib.suppress(Unavailable, ProtocolError):
                return await ask(engine)
            engine.there = False
    return (await ask_all(engines, ask))[0]


def _told(body: object) -> object:
    """The message of an error in OpenAI's form: a server that has the path and not the model sends one."""
    error = body.get("error") if isinstance(body, dict) else None
    return error.get("message") if isinstance(error, dict) else None
