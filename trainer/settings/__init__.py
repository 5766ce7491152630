"""Settings of a run: sections, presets, and what they may be."""
