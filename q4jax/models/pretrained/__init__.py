"""Pretrained models, from and to Hugging Face directories."""
