"""The differentiable ops on 4-bit weights: quantize, dequantize, matmul, embedding lookup.

One file an op; `registry` chooses the implementation that computes it.
"""
