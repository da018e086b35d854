"""Questions about a complete model or pytree: its leaves, memory, fingerprint and shardings."""
