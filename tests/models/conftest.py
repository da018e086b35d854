"""Fixtures of a tiny Llama."""

from tests.support.tiny_llama import config, forward, input_ids, model, relative

__all__ = ["config", "forward", "input_ids", "model", "relative"]
