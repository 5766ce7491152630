"""Layers of a block and of the stage: tensor-parallel linears, the MLP and RMSNorm."""
