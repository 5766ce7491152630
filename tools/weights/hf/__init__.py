"""Hugging Face transformers' RecurrentGemma."""
