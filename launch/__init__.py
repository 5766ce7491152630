"""Launchers: ranks as local processes, or under torchrun, SLURM and MPI."""
