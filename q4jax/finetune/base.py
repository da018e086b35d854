"""The model that a run adapts: where it comes from, and how its adapters are made."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from q4jax.convert.config import QuantConfig
from q4jax.finetune.hub import HubModel
from q4jax.finetune.placement import Placement
from q4jax.finetune.settings import Settings, SettingsError
from q4jax.finetune.tokens import Tokenizer
from q4jax.interop.files import read_json
from q4jax.lora.inject import add_lora
from q4jax.models.decoder.config import LlamaConfig
from q4jax.models.decoder.decoder import Llama
from q4jax.models.pretrained.load import from_pretrained
from q4jax.nnx.convert import quantize_model

# What the loaders raise for a file or a model that they do not take.
_ERRORS = (OSError, ValueError, NotImplementedError)


@dataclasses.dataclass(frozen=True)
class Base:
    """A model that is not loaded yet.

    Attributes:
      config: its sizes and architecture.
      tokenizer: its tokenizer.
      load: a function that loads it, in 4 bits, or dense for None. The projections of a model that
        `is_quantized` stay as they are.
      is_quantized: whether its weights are in 4 bits before they are loaded.
      folder: its Hugging Face directory; None: it comes from elsewhere.
      name: what the adapter's files call it: a name on the hub, or a directory.
      revision: that of a name on the hub; None: the main branch.
    """

    config: LlamaConfig
    tokenizer: Tokenizer
    load: Callable[[QuantConfig | None], Llama]
    is_quantized: bool = False
    folder: Path | None = None
    name: str | None = None
    revision: str | None = None

    @classmethod
    def of_directory(
        cls,
        folder: Path,
        settings: Settings,
        placement: Placement,
        *,
        name: str | None = None,
        weights: Callable[[], Path] | None = None,
    ) -> "Base":
        """Read the config and the tokenizer of a Hugging Face directory.

        Args:
          folder: the directory.
          settings: those of the run.
          placement: that of the run.
          name: what the adapter's files call the model; None: the directory.
          weights: a function that returns the directory with the weights too; None: it is `folder`.

        Raises:
          SettingsError: a file is missing or malformed, or the family is not supported.
        """
        try:
            entries = read_json(folder / "config.json")
            config = LlamaConfig.from_hf(entries)
        except _ERRORS as error:
            raise _of_model(error) from None
        is_quantized = entries.get("quantization_config") is not None
        mesh = None if placement.rules is None else placement.rules.mesh
        dtype = None if settings.dtype is None else jnp.dtype(settings.dtype)

        def load(quantization: QuantConfig | None) -> Llama:
            chosen = None if is_quantized else quantization
            return from_pretrained(weights() if weights else folder, chosen, dtype, mesh)

        tokenizer = Tokenizer.load(folder)
        return cls(config, tokenizer, load, is_quantized, folder, name or str(folder))

    def load_4bit(self, settings: Settings, placement: Placement) -> Llama:
        """Load the model in 4 bits, weight by weight; SettingsError that says what is wrong."""
        try:
            model = self.load(quantization(settings))
        except _ERRORS as error:
            raise _of_model(error) from None
        return placement.place(model) if self.folder is None else model


def find_base(settings: Settings, placement: Placement) -> Base:
    """Return the base that the settings name: a directory, or a model of the hub.

    Of a model of the hub, the config and the tokenizer are downloaded, and the weights when it is
    loaded.

    Raises:
      SettingsError: as `Base.of_directory`; or there is no such model.
    """
    if settings.model is None:
        raise SettingsError("--model must be a directory or a name on the hub, got none")
    if Path(settings.model).expanduser().is_dir():
        folder = Path(settings.model).expanduser()
        return Base.of_directory(folder.resolve(), settings, placement)
    found = HubModel.parse(settings.model)
    if found is None:
        raise SettingsError(
            f"--model: there is no directory {settings.model}, and models of the hub are org/name "
            "or org/name@revision"
        )
    base = Base.of_directory(
        found.description(), settings, placement, name=found.name, weights=found.weights
    )
    return dataclasses.replace(base, revision=found.revision)


def quantization(settings: Settings) -> QuantConfig:
    """Return how the projections are quantized; lm_head stays as it is."""
    return QuantConfig(
        quant_type=settings.quant_type,
        blocksize=settings.blocksize,
        compress_statistics=not settings.no_double_quant,
    )


def adapt(model: Llama, settings: Settings) -> Llama:
    """Return a 4-bit model with fresh adapters.

    Raises:
      SettingsError: no layer can have them.
    """
    try:
        adapted = add_lora(
            model,
            settings.rank,
            settings.alpha,
            targets=settings.targets,
            rslora=settings.rslora,
            dora=settings.dora,
            dropout=settings.dropout,
            rngs=nnx.Rngs(settings.seed),
        )
    except (ValueError, NotImplementedError) as error:
        raise SettingsError(f"the adapters: {error}") from None
    adapted.remat = not settings.no_remat
    return adapted


def check_layers(base: Base, settings: Settings, placement: Placement) -> None:
    """Raise SettingsError, before a weight is read, if layers cannot be adapted or placed so."""

    def fresh() -> Llama:
        model = Llama(base.config, rngs=nnx.Rngs(0))
        return adapt(quantize_model(model, quantization(settings)), settings)

    model: Llama = nnx.eval_shape(fresh)
    if not base.is_quantized:  # else the files say how large blocks are
        try:
            placement.place(model)
        except ValueError as error:
            raise SettingsError(f"--mesh {settings.mesh}: {error}") from None


def _of_model(error: Exception) -> SettingsError:
    return SettingsError(f"--model: {' '.join(str(error).split())}")
