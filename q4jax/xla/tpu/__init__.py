"""The ops in plain XLA as TPUs like them: no gathers, no interleaving of a weight's nibbles."""
