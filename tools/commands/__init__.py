"""The sub-commands of `griffin`, one file each: parse arguments and call one function."""
