"""The run folder, its lock and log files, and requests to stop the run."""
