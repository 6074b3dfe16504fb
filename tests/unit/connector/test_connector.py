"""What the connector does to the process that vLLM loads it into."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from loracache.connectors.vllm.connector import _log_as_vllm_does


class Kept(logging.Handler):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def loggers() -> Iterator[tuple[logging.Logger, logging.Logger]]:
    """Ours, which nobody has configured, and vLLM's; both as they were at the end. No fixture: when a test begins,
    pytest gives handlers to loggers that do not propagate.
    """
    ours, theirs = logging.getLogger("loracache"), logging.getLogger("vllm")
    kept = [(logger, logger.level, logger.handlers, logger.propagate) for logger in (ours, theirs)]
    ours.handlers, theirs.handlers = [], []
    ours.propagate = False  # there are pytest's above it
    ours.setLevel(logging.NOTSET)
    try:
        yield ours, theirs
    finally:
        for logger, level, handlers, propagate in kept:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


def test_what_it_logs_is_shown_as_vllm_shows_its_own() -> None:
    with loggers() as (_, theirs):
        handlers = [Kept(), Kept()]
        theirs.handlers = list(handlers)
        theirs.setLevel(logging.INFO)
        for _ in range(2):  # the scheduler's side and the worker's may be in one process
            _log_as_vllm_does()
        below = logging.getLogger("loracache.connectors.vllm.scheduler")
        below.info("shown")
        below.debug("not shown")
        assert [handler.messages for handler in handlers] == [["shown"], ["shown"]]
        theirs.info("theirs")
        assert handlers[0].messages == ["shown", "theirs"]


def test_a_logger_that_somebody_configured_is_left_alone() -> None:
    with loggers() as (ours, theirs):
        mine, other = Kept(), Kept()
        theirs.handlers = [other]
        theirs.setLevel(logging.DEBUG)
        ours.addHandler(mine)
        ours.setLevel(logging.ERROR)
        _log_as_vllm_does()
        assert ours.handlers == [mine]
        assert ours.level == logging.ERROR


def test_a_root_logger_that_somebody_configured_is_enough() -> None:
    with loggers() as (ours, theirs):
        other = Kept()
        theirs.handlers = [other]
        theirs.setLevel(logging.DEBUG)
        ours.propagate = True
        assert logging.getLogger().handlers
        _log_as_vllm_does()
        assert ours.handlers == []
        assert ours.level == logging.NOTSET
