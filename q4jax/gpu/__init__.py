"""What the GPU implementations share: PTX decoding, tile sizes, CUDA-only calls."""
