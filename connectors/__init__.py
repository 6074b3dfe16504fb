# SPDX-License-Identifier: Apache-2.0
"""Connectors: what plugs LoRACache into serving engines.

May import: nothing of ours
"""
