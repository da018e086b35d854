"""Code shared by the GPU implementations: PTX decoding, tile sizes, CUDA-only calls."""
