# SPDX-License-Identifier: Apache-2.0
"""The connector, but the engine's loop never waits for the answer to a lookup: what waiting gains (bench_serving.py).

Loaded by vLLM by its module's name.
"""

from __future__ import annotations

from loracache.connectors.vllm import LoRACacheConnector
from loracache.connectors.vllm.common import answer_times

__all__ = ["ImpatientConnector"]

answer_times._MOST_S = 0.0


class ImpatientConnector(LoRACacheConnector):
    """See the module's docstring."""
