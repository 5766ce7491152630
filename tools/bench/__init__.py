"""Benchmarks of `griffin bench`, each beside a peer in the same run."""
