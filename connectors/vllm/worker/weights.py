# SPDX-License-Identifier: Apache-2.0
"""Which weights this worker computes with: a version that grows with every change, noticed where vLLM makes it.

vLLM replaces weights in place in several ways (`reload_weights`, a weight update's session, sleep of level 2, the
model's `load_weights` called by an extension of the worker). The methods are hooked on the worker's class; a release
that lacks one is fine. A change counts from before its first byte until after its last; KV of the time between belongs
to no weights at all. What is changed past all of them is found by comparing a sampled fingerprint: when an extension's
method or `apply_model` has run, and when the engine's prefix cache was reset.

Threading: everything runs on the worker's main thread.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from loracache.connectors.vllm.worker.fingerprint import weights_fingerprint

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["WeightsWatch", "hook_worker_class", "worker_class"]

_log = logging.getLogger(__name__)
_watches: weakref.WeakSet[WeightsWatch] = weakref.WeakSet()
_CHANGES = ("reload_weights", "load_model")
_SESSION = ("start_weight_update", "start_draft_weight_update", "update_weights", "finish_weight_update")
_MARK = "_loracache_watches_weights"


class WeightsWatch:
    """rank: of this worker in its engine. changed() is called before the first byte of a change; slept() before the KV
    cache's memory goes, woke() when it is back.
    """

    def __init__(
        self, rank: int, changed: Callable[[], None], slept: Callable[[], None], woke: Callable[[], None]
    ) -> None:
        self._rank = rank
        self._changed = changed
        self.slept = slept
        self.woke = woke
        self.version = 0
        self._depth = 0
        self._session = False
        self._step = 0
        self._changed_at = 0
        self._told = 0
        self._worker: Any = None
        self._asleep = False
        self._fingerprint: bytes | None = None
        self._outdated = True
        self.suspect = False

    def install(self, config: VllmConfig) -> None:
        """Hear of what the workers of this process do."""
        _watches.add(self)
        cls = worker_class(config)
        if cls is None:
            named = getattr(config.parallel_config, "worker_cls", "")
            _log.warning("the worker's class %r is unknown: every reset counts as new weights", named)
        else:
            hook_worker_class(cls, getattr(config.parallel_config, "worker_extension_cls", ""))

    def bind(self, worker: Any) -> None:
        """The worker, once its model is ready. Whoever calls its model's own `load_weights` changes weights, too."""
        if self._worker is worker:
            return
        self._worker = worker
        with contextlib.suppress(AttributeError, RuntimeError, TypeError):  # `_look` says what it cannot do
            for model in self._models():
                load = getattr(model, "load_weights", None)
                if load is not None:
                    model.load_weights = _changing(load)
        self._fingerprint = self._look()
        self._outdated = False

    # -- changes ----------

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """Weights are replaced inside; also where it fails."""
        self._begin()
        try:
            yield
        finally:
            self._end()

    def session(self, worker: Any, name: str, call: Callable[[], Any]) -> Any:
        """A call of a weight update's session, which is one change from its start to its end."""
        self._begin()
        ended = name == "finish_weight_update"
        try:
            result = call()
        except BaseException:
            ended = name == "update_weights"
            raise
        else:
            return result
        finally:
            is_open = bool(getattr(worker, "_weight_update_active", not ended))
            if is_open and not self._session:
                self._session = True  # the change stays open
            elif self._session and not is_open:
                self._session = False
                self._end()
                self._end()
            else:
                self._end()

    def fall_asleep(self, *, weights: bool, forget: bool) -> None:
        """Weights, or only the KV cache, are about to leave memory; forget: and are not kept anywhere."""
        self.slept()
        self._asleep = self._asleep or weights
        if forget:
            with self.change():
                pass

    def wake(self, *, weights: bool, kv_cache: bool) -> None:
        """They are back."""
        if weights:
            self._asleep = False
        if kv_cache:
            self.woke()

    # -- plans and news ----------

    def begin_step(self, step: int, *, check: bool) -> None:
        """Before anything of this step is loaded, stored or computed. check: look whether the weights are the same."""
        self.suspect = self.suspect or check
        if not self._asleep and not self._depth:
            if self._outdated:
                self._fingerprint = self._look()
                self._outdated = self.suspect = False
            elif self.suspect:
                self.suspect = False
                before, self._fingerprint = self._fingerprint, self._look()
                if self._fingerprint is None or self._fingerprint != before:
                    _log.info("the weights were changed in place")
                    with self.change():
                        pass
                    self._outdated = False
        self._step = step

    def believes(self, versions: Mapping[int, int]) -> bool:
        """Whether the scheduler knows which weights these are, and they are whole."""
        return not self._depth and versions.get(self._rank, 0) == self.version

    def take_news(self) -> dict[int, tuple[int, int]]:
        """rank -> (version, the last step computed with weights of before), where that is new."""
        if self._told == self.version:
            return {}
        self._told = self.version
        return {self._rank: (self.version, self._changed_at)}

    # -- inside ----------

    def _begin(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._advance()
            self._changed()

    def _end(self) -> None:
        self._depth -= 1
        if not self._depth:
            self._advance()
            self._outdated = True

    def _advance(self) -> None:
        self.version += 1
        self._changed_at = self._step

    def _models(self) -> list[Any]:
        runner = getattr(self._worker, "model_runner", None)
        if runner is None:
            return []
        models = [runner.get_model() if hasattr(runner, "get_model") else runner.model]
        draft = getattr(self._worker, "get_draft_model", lambda: None)()
        return models + ([draft] if draft is not None else [])

    def _look(self) -> bytes | None:
        """None where the model cannot be looked at: then any doubt counts as a change."""
        try:
            models = self._models()
            return weights_fingerprint(models) if models else None
        except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
            _log.warning("the weights cannot be looked at (%s): every reset counts as new weights", error)
            return None


def worker_class(config: VllmConfig) -> type | None:
    """The class that vLLM makes this engine's workers of."""
    named = getattr(config.parallel_config, "worker_cls", "")
    if isinstance(named, type):
        return named
    module, _, name = str(named).rpartition(".")
    if not module:
        return None
    import importlib

    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    return found if isinstance(found, type) else None


def hook_worker_class(cls: type, extension: str = "") -> None:
    """Hook what replaces weights, each method once. extension: the qualified name of what users mix into the class."""
    hooked = vars(cls).get(_MARK, frozenset())
    hooks: dict[str, Callable[[Any, str, Callable[[], Any], tuple[Any, ...], dict[str, Any]], Any]] = {
        **dict.fromkeys(_CHANGES, _hook_change),
        **dict.fromkeys(_SESSION, _hook_session),
        **dict.fromkeys(["apply_model", *_methods_of(cls, extension)], _hook_suspect),
        "compile_or_warm_up_model": _hook_ready,
        "sleep": _hook_sleep,
        "wake_up": _hook_wake,
        "discard": _hook_discard,
    }
    for name, hook in hooks.items():
        original = getattr(cls, name, None)
        if original is not None and name not in hooked:
            setattr(cls, name, _hooked(original, name, hook))
    setattr(cls, _MARK, hooked | {name for name in hooks if hasattr(cls, name)})


def _methods_of(cls: type, extension: str) -> list[str]:
    """What the mixed in class brings, its own bases' methods too."""
    short = extension.rpartition(".")[2]
    mixed_in = next((base for base in cls.__mro__ if short and base.__name__ == short), object)
    return [
        name
        for base in mixed_in.__mro__[:-1]
        for name, value in vars(base).items()
        if callable(value) and not name.startswith("__") and not isinstance(value, (staticmethod, classmethod))
    ]


def _hooked(original: Any, name: str, hook: Any) -> Any:
    @functools.wraps(original)
    def method(worker: Any, *args: Any, **kwargs: Any) -> Any:
        return hook(worker, name, lambda: original(worker, *args, **kwargs), args, kwargs)

    return method


def _changing(call: Any) -> Any:
    @functools.wraps(call)
    def change(*args: Any, **kwargs: Any) -> Any:
        with _all_change():
            return call(*args, **kwargs)

    return change


@contextlib.contextmanager
def _all_change() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for watch in list(_watches):
            stack.enter_context(watch.change())
        yield


def _hook_change(worker: Any, name: str, call: Any, args: Any, kwargs: Any) -> Any:
    with _all_change():
        return call()


def _hook_session(worker: Any, name: str, call: Any, args: Any, kwargs: Any) -> Any:
    for watch in list(_watches):
        call = functools.partial(watch.session, worker, name, call)
    return call()


def _hook_suspect(worker: Any, name: str, call: Any, args: Any, kwargs: Any) -> Any:
    try:
        return call()
    finally:
        for watch in list(_watches):
            watch.suspect = True


def _hook_ready(worker: Any, name: str, call: Any, args: Any, kwargs: Any) -> Any:
    result = call()
    for watch in list(_watches):
        watch.bind(worker)
    return result


def _hook_sleep(worker: Any, name: str, call: Any, args: Any, kwargs: Any) -> Any:
    level = args[0] if args else kwargs.get("level", 1)
    for watch in list(_watches):
        watch.fall_asleep(weights=True, forget=level >= 2)
    return call()


def _hook_wake(worker: Any, name: str, call: Any, args: Any, kwargs: Any) -> Any:
    tags = args[0] if args else kwargs.get("tags")
    result = call()
    for watch in list(_watches):
        watch.wake(weights=tags is None or "weights" in tags, kv_cache=tags is None or "kv_cache" in tags)
    return result


def _hook_discard(worker: Any, name: str, call: Any, args: Any, kwargs: Any) -> Any:
    tags = args[0] if args else kwargs.get("tags", ())
    weights = "weights" in tags
    if weights or "kv_cache" in tags:
        for watch in list(_watches):
            watch.fall_asleep(weights=weights, forget=weights)
    return call()
