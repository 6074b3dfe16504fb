"""Storage backends: tiers below the arena. `base` holds the interface and its contract."""
