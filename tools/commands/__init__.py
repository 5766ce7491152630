"""A file per sub-command of `griffin`: arguments in, one call out."""
