"""What watches a run: hangs, stragglers, replicas and loss spikes."""
