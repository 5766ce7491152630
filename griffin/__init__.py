"""Distributed training of Griffin and Hawk language models."""

__version__ = "0.1.0"
