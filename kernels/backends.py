"""Names of the backends. They are selected in `griffin.kernels.selection`."""

AUTO = "auto"
# A loop over time that defines the operation; PyTorch operations optimised for CPUs; Triton programs.
BACKENDS = ("reference", "cpu", "triton")
