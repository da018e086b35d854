"""The Pallas kernels for TPUs: what "pallas" is there, and "pallas_tpu_interpret" anywhere."""
