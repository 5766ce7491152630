"""The state of runs and installations, as people see it."""
