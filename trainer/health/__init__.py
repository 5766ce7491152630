"""Health of a run: hangs, stragglers, replicas that differ, loss spikes and non-finite gradients."""
