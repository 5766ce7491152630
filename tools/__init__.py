"""The sub-commands of `griffin`, one file each."""
