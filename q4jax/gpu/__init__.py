"""What the GPU implementations share: decoding in PTX, tile sizes, CUDA-only calls, requirements."""
