"""The 4-bit layers for Flax NNX, and the conversion of NNX models."""
