"""Starting ranks: local processes, torchrun, SLURM and MPI."""
