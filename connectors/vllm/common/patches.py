# SPDX-License-Identifier: Apache-2.0
"""Patches of vLLM's modules: each is made when vLLM itself imports the module, and a patch that does not fit leaves the
module as it was. State of a process: what went wrong, for whoever needs the patches. Light to import.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from loracache.connectors.vllm.common.releases import vllm_version

__all__ = ["Patcher", "begin", "failed", "install", "problem", "problems"]

_log = logging.getLogger(__name__)
_begun = False
problems: list[str] = []


def begin() -> bool:
    """True at the first call in a process: its patches are made once."""
    global _begun
    first, _begun = not _begun, True
    return first


def install(patches: dict[str, Callable[[Any], None]]) -> None:
    """Patch the modules of these names, now where they are imported already, else when they are."""
    waiting = dict(patches)
    for name in [name for name in patches if name in sys.modules]:
        _apply(waiting.pop(name), sys.modules[name])
    sys.meta_path.insert(0, Patcher(waiting))


def problem() -> str:
    """Why lora_pool cannot be served by the vLLM of this process, or ""."""
    if not _begun:
        return (
            "vLLM did not load the plugin 'loracache'; install loracache into vLLM's environment, and name it in "
            "VLLM_PLUGINS where that is set"
        )
    return "; ".join(problems)


def failed(what: str, error: Exception) -> None:
    """Note that a patch does not fit; it is said once, in the log."""
    problems.append(f"with vLLM {vllm_version()}, {what} ({error!r})")
    _log.warning("%s: vLLM's own LoRA is left as it is", problems[-1])


def _apply(patch: Callable[[Any], None], module: Any) -> None:
    try:
        patch(module)
    except Exception as error:  # noqa: BLE001 - vLLM is importing: whatever is wrong with us, it must start
        failed(f"{module.__name__} is not what we know", error)


class Patcher(importlib.abc.MetaPathFinder):
    """Runs a patch on a module when it has been imported."""

    def __init__(self, patches: dict[str, Callable[[Any], None]]) -> None:
        self._patches = patches

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the others find, whose loader patches."""
        patch = self._patches.pop(fullname, None)
        if patch is None:
            return None
        spec = importlib.util.find_spec(fullname)
        loader = spec.loader if spec is not None else None
        if loader is not None:
            load = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                _apply(patch, module)

            try:
                loader.exec_module = exec_module  # type: ignore[method-assign]
            except AttributeError as error:
                failed(f"{fullname} is imported in a way of its own", error)
        return spec
