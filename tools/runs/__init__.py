"""Inspect runs (`griffin monitor`) and installations (`griffin doctor`)."""
