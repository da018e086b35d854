"""The Llama family: configuration, decoder, attention, experts and shardings."""
