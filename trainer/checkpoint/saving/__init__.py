"""Background saves: one saving process per rank writes checkpoints while training continues."""
