"""What the linear scan and the RG-LRU share: Triton programs, plans and their launch."""
