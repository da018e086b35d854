"""The Pallas kernels for NVIDIA GPUs: the implementations "pallas" and "pallas_interpret"."""
