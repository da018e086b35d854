"""The model that a command names: a directory, a model of the hub, or the folder of a run."""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from q4jax import finetune
from q4jax.convert.config import QuantConfig
from q4jax.core.codebooks import CODEBOOKS
from q4jax.finetune.hub import HubModel
from q4jax.finetune.settings import SettingsError
from q4jax.finetune.tokens import Tokenizer
from q4jax.interop import peft
from q4jax.interop.files import read_json
from q4jax.models.decoder.config import LlamaConfig
from q4jax.models.decoder.decoder import Llama
from q4jax.models.pretrained.load import from_pretrained

_ERRORS = (OSError, ValueError, NotImplementedError)


class Opened(NamedTuple):
    """A model whose weights are not read yet.

    Attributes:
      folder: its Hugging Face directory, or the folder of a run.
      config: its configuration.
      entries: the content of `config.json`.
      is_run: whether it is a run of `finetune`, with adapters.
      adapter: the directory of a PEFT adapter, or None.
      hub: the model of the hub whose weights are not downloaded yet, or None.
    """

    folder: Path
    config: LlamaConfig
    entries: dict[str, Any]
    is_run: bool = False
    adapter: Path | None = None
    hub: HubModel | None = None

    @property
    def tokenizer_folder(self) -> Path:
        """The directory with the tokenizer's files."""
        return self.folder / "adapter" if self.is_run else self.folder

    @property
    def is_quantized(self) -> bool:
        """Whether the stored weights are in 4 bits."""
        return self.entries.get("quantization_config") is not None

    def tokenizer(self) -> Tokenizer:
        """Read the tokenizer."""
        return Tokenizer.load(self.tokenizer_folder)

    def stops(self, tokenizer: Tokenizer) -> list[int]:
        """Return the tokens that end a text, as the model's files say."""
        file = self.folder / "generation_config.json"
        entries = [self.entries, read_json(file) if file.is_file() else {}]
        found: list[Any] = [tokenizer.eos]
        for value in (entry.get("eos_token_id") for entry in entries):
            found += value if isinstance(value, list) else [value]
        known = {t for t in found if type(t) is int and 0 <= t < self.config.vocab_size}
        return sorted(known)

    def load(self, quantization: QuantConfig | None = None) -> Llama:
        """Read the weights, and the adapter."""
        if self.is_run:
            return finetune.restore(self.folder)
        folder = self.folder if self.hub is None else self.hub.weights()
        model = from_pretrained(folder, None if self.is_quantized else quantization)
        return model if self.adapter is None else peft.load_adapters(model, self.adapter)


def open_model(name: str, adapter: str | None = None) -> Opened:
    """Find a model and read its config; of the hub's models, download no weights.

    Args:
      name: a directory, `org/name[@revision]`, or the folder of a run of `finetune`.
      adapter: the directory of a PEFT adapter, or None.

    Raises:
      SettingsError: there is no such model or adapter, or the model's family is not supported.
    """
    path = Path(name).expanduser()
    hub = None if path.exists() else HubModel.parse(name)
    if hub is not None:
        path = hub.description()
    elif not path.is_dir():
        raise SettingsError(
            f"there is no directory {name}, and models of the hub are org/name or org/name@revision"
        )
    entries = read_config(path)
    try:
        config = LlamaConfig.from_hf(entries)
    except _ERRORS as error:
        raise SettingsError(f"{name}: {' '.join(str(error).split())}") from None
    is_run = (path / "checkpoint").is_dir() and (path / "adapter").is_dir()
    if adapter is None:
        return Opened(path, config, entries, is_run, None, hub)
    if is_run:
        raise SettingsError(f"{name} is a run with adapters of its own; it takes no other adapter")
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise SettingsError(f"{adapter} is no PEFT adapter: it has no adapter_config.json")
    return Opened(path, config, entries, is_run, Path(adapter), hub)


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of a `config.json`, or of that in a directory.

    Raises:
      SettingsError: it is missing or malformed.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"{file} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise SettingsError(f"{file} must be a JSON object")
    return found


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """Add the option `--quantize`."""
    parser.add_argument(
        "--quantize",
        choices=tuple(CODEBOOKS),
        help="quantize the projections of a model in full precision while it is loaded",
    )


def quantization(options: argparse.Namespace, opened: Opened) -> QuantConfig | None:
    """Return how `--quantize` says to quantize; SettingsError where that is done already."""
    if options.quantize is None:
        return None
    if opened.is_run or opened.is_quantized:
        raise SettingsError(f"--quantize {options.quantize}: the model is in 4 bits already")
    return QuantConfig(quant_type=options.quantize)
