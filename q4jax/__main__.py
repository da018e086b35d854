"""`python -m q4jax`: inspect, verify and convert checkpoints."""

import sys

from q4jax.cli.main import main

sys.exit(main())
