"""Temporal mixers: the gated linear recurrence and local attention."""
