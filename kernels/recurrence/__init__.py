"""Triton programs, launch plans and launches shared by the linear scan and the RG-LRU."""

MIN_SQRT_ARGUMENT = 1e-6 / 4  # sqrt'(x) is evaluated at no less: it is at most 1 / sqrt(1e-6) = 1000
