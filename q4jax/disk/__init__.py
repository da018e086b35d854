"""Files and directories that are written whole or not at all, by one writer at a time."""

from q4jax.disk.whole import new_file, whole_directory, whole_file

__all__ = ["new_file", "whole_directory", "whole_file"]
