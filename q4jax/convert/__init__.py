"""Which layers of a model become 4-bit, and how, for NNX and Linen alike.

Configuration, rules, the plan, and the axes of kernels; it imports no Flax module.
"""
