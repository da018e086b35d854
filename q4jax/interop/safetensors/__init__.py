"""Safetensors files, read in place and written without a second copy."""
