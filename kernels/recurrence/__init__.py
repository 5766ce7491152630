"""What the linear scan and the RG-LRU share: Triton programs, plans and their launch."""

MIN_SQRT_ARGUMENT = 1e-6 / 4  # below it sqrt'(x) is taken there: at most 1 / sqrt(1e-6) = 1000
