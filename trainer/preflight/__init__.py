"""Checks of every rank's machine, device and links before the first step."""
