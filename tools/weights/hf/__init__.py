"""Read and write transformers' RecurrentGemma folders."""
