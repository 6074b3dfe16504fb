"""Connectors: what plugs LoRACache into serving engines."""
