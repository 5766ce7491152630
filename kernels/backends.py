"""The names of implementations, for settings: their choice is in `griffin.kernels.selection`."""

AUTO = "auto"
# A loop that defines the operation, what is made for CPUs, and Triton's programs.
BACKENDS = ("reference", "cpu", "triton")
