"""Questions about a whole model or pytree: its leaves, memory, fingerprint and shardings."""
