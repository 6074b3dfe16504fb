"""Connectors: what plugs LoRACache into serving engines.

May import: nothing of ours
"""
