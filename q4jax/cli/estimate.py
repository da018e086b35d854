"""`python -m q4jax estimate`: the memory of a model before anything is downloaded."""

import argparse
from pathlib import Path

from q4jax.cli.open_model import read_config
from q4jax.core.codebooks import BLOCKSIZES
from q4jax.finetune import mesh_text
from q4jax.finetune.hub import HubModel
from q4jax.finetune.memory import estimate
from q4jax.finetune.placement import simulate
from q4jax.finetune.settings import Settings, SettingsError

DESCRIPTION = """Print the memory of fine-tuning a model and of generating with it, by part.

Only config.json is read. The step of `finetune` is compiled from shapes, for this machine's
platform; nothing is allocated. With --mesh, a CPU simulates the devices."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("model", help="a directory or a config.json, or org/name on the hub")
    add("--context", type=int, required=True, metavar="N", help="tokens of a row, and of the cache")
    add("--batch", type=int, default=1, metavar="N", help="rows of a step (default: 1)")
    add("--rank", type=int, default=16, metavar="N", help="rank of the adapters (default: 16)")
    add("--blocksize", type=int, choices=BLOCKSIZES, default=64, help="default: 64")
    add("--no-remat", action="store_true", help="keep all activations")
    add("--mesh", metavar="TEXT", help="such as fsdp=4,tensor=2 (default: one device)")
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> None:
    """Run the command."""
    if options.mesh is not None:
        try:
            mesh_text.sizes(options.mesh)
        except ValueError as error:
            raise SettingsError(f"--mesh {error}") from None
    if options.context < 2:
        raise SettingsError(f"--context must be at least 2, got {options.context}")
    settings = Settings(
        model=None,
        length=options.context,
        batch=options.batch,
        rank=options.rank,
        blocksize=options.blocksize,
        no_remat=options.no_remat,
        mesh=options.mesh,
    )
    path = Path(options.model).expanduser()
    if not path.exists():
        hub = HubModel.parse(options.model)
        if hub is None:
            raise SettingsError(
                f"there is no {options.model}, and models of the hub are org/name or "
                "org/name@revision"
            )
        path = hub.description()
    entries = read_config(path)
    simulate(options.mesh)
    try:
        found = estimate(entries, settings, options.mesh)
    except (ValueError, NotImplementedError) as error:
        raise SettingsError(f"{options.model}: {' '.join(str(error).split())}") from None
    print(found)
