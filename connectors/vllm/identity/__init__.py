# SPDX-License-Identifier: Apache-2.0
"""Which model an engine serves: its effective configuration and the content of its weights, as one digest.

May import: connectors.vllm.common, errors
Threads: a thread in the background reads the weights; the engine's loop asks whether it is done.
"""
