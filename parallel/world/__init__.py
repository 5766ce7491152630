"""Ranks of a run: rendezvous, messages between them, and the rank grid with its process groups."""
