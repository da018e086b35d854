"""Models and trainers of other packages, none of which is imported here."""

from q4jax.integrations import tunix as tunix
