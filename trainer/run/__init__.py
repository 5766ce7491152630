"""A run's folder on disk, its lock and its logs, and requests to stop it."""
