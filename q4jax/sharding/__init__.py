"""How any op runs on a mesh: batched, partitioned by the compiler, or under `shard_map`.

It knows the axes of an op's arrays and nothing of 4 bits.
"""
