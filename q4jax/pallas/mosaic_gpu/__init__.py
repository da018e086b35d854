"""The Pallas kernels for Hopper through Mosaic GPU: the implementation "mosaic_gpu"."""
