"""Settings of a run: sections, presets, loading and validation."""
