"""`QuantRule`: which layers of a model become 4-bit, and how, by a regular expression."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax.typing import DTypeLike

from q4jax.convert.config import QuantConfig, list_paths
from q4jax.core.argument_names import name_ours
from q4jax.core.codebooks import QuantType

EVERY = ".*"


@name_ours
@dataclasses.dataclass(frozen=True)
class QuantRule:
    r"""What happens to the layers whose complete path a regular expression matches.

    Rules are an ordered list: the first that matches a layer decides. A layer that none matches is
    left alone.

    Attributes:
      pattern: for the whole dotted path of a layer (`re.fullmatch`), such as `r".*\.q_proj"`.
      skip: leave these layers alone.
      quant_type: "nf4" or "fp4".
      blocksize: as `QuantConfig` has it.
      compress_statistics: double quantization of the scales.
      dtype: compute dtype; None: that of the layer.
      embeddings: take embeddings too; without it they are left alone.

    Raises:
      ValueError: a setting that is not allowed; the pattern is no regular expression.

    Examples:
      >>> import q4jax
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Dict(
      ...     up=nnx.Linear(64, 64, rngs=rngs), down=nnx.Linear(64, 64, rngs=rngs),
      ...     head=nnx.Linear(64, 64, rngs=rngs),
      ... )
      >>> rules = [
      ...     q4jax.QuantRule("head", skip=True),
      ...     q4jax.QuantRule("down", quant_type="fp4", blocksize=32),
      ...     q4jax.QuantRule(),
      ... ]
      >>> small = q4jax.quantize_model(model, rules)
      >>> small.down.weight.quant_state.spec.tag(), type(small.head).__name__
      ('fp4_b32_n256_float32_64x64', 'Linear')
    """

    __module__ = "q4jax"

    pattern: str = EVERY
    _: dataclasses.KW_ONLY
    skip: bool = False
    quant_type: QuantType = "nf4"
    blocksize: int = 64
    compress_statistics: bool = True
    dtype: DTypeLike | None = None
    embeddings: bool = False

    def __post_init__(self):
        compiled(self.pattern)
        QuantConfig(self.quant_type, self.blocksize, self.compress_statistics, self.dtype)

    def matches(self, path: str) -> bool:
        """Return whether the pattern matches a complete path."""
        return compiled(self.pattern).fullmatch(path) is not None

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the 4-bit layers."""
        return {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "compress_statistics": self.compress_statistics,
            "dtype": self.dtype,
        }


Config = QuantConfig | Sequence[QuantRule] | None


def compiled(pattern: Any) -> "re.Pattern[str]":
    """Compile a regular expression; ValueError, with the reason, for anything else."""
    if not isinstance(pattern, str):
        raise ValueError(f"a pattern must be a string, got {pattern!r}")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None


class Rules:
    """A `QuantConfig` or a list of `QuantRule`s, applied path by path.

    Args:
      config: the configuration; None: the default one.
      overrides: fields that replace those of the configuration.
      aliases: for a path, the other names of each matrix that is stacked there, such as that of its
        module in a checkpoint.

    Raises:
      TypeError: `config` is something else, or `overrides` has a field beside rules.
    """

    def __init__(
        self,
        config: Config,
        overrides: dict[str, Any],
        aliases: Mapping[str, Sequence[Sequence[str]]] | None = None,
    ):
        self._aliases = aliases or {}
        self._config: QuantConfig | None = None
        if config is None or isinstance(config, QuantConfig):
            self._config = dataclasses.replace(config or QuantConfig(), **overrides)
            fields = dataclasses.asdict(self._config)
            del fields["skip"]
            self.rules: tuple[QuantRule, ...] = (QuantRule(**fields),)
            return
        rules: Any = config
        if not isinstance(rules, Sequence) or not all(isinstance(r, QuantRule) for r in rules):
            raise TypeError(f"config must be a QuantConfig or a list of QuantRules, got {rules!r}")
        if overrides:
            raise TypeError(f"{sorted(overrides)} beside rules: write it into the rules")
        self.rules = tuple(rules)

    def choose(self, path: str) -> tuple[QuantRule | None, str]:
        """Return the rule for the layer at a path; or None, and the reason why it is kept.

        Raises:
          ValueError: matrices that are stacked at the path have different rules.
        """
        found = self.choose_each(path)
        rule, reason = found[0]
        other = next((i for i, (own, _) in enumerate(found) if own != rule), None)
        if other is not None:
            names = self._aliases[path]
            raise ValueError(
                f"{names[0][0]} and {names[other][0]} have different rules, but their layers are "
                f"stacked in {path}: quantize all of them alike"
            )
        return rule, reason

    def choose_each(self, path: str) -> list[tuple[QuantRule | None, str]]:
        """Return what `choose` does for each matrix that is stacked at the path."""
        names = self._aliases.get(path) or [()]
        return [self._choose((path.replace("/", "."), path, *own)) for own in names]

    def _choose(self, names: Sequence[str]) -> tuple[QuantRule | None, str]:
        skips = self._config.skips if self._config is not None else lambda name: None
        entry = next((entry for name in names if (entry := skips(name)) is not None), None)
        if entry is not None:
            return None, f"skip has {entry!r}"
        matching = (rule for rule in self.rules if any(rule.matches(name) for name in names))
        rule = next(matching, None)
        if rule is None:
            return None, "no rule matches it"
        return (None, f"rule {rule.pattern!r} skips it") if rule.skip else (rule, "")

    def require_matches(self, layers: Iterable[str], modules: Iterable[str]) -> None:
        """Raise ValueError where a rule matches no layer, or a skip list's entry keeps nothing.

        Args:
          layers: paths of the layers that rules are compared with.
          modules: paths of the modules that hold parameters.
        """
        layers = [*layers]
        known = [name for path in layers for own in self._aliases.get(path, ()) for name in own]
        patterns = [rule.pattern for rule in self.rules if rule.pattern != EVERY]
        require_matches(patterns, [*layers, *known])
        if self._config is not None:
            paths = [path.replace("/", ".") for path in modules]
            names = [name for each in self._aliases.values() for own in each for name in own]
            self._config.require_skips([*names, *paths])


def require_matches(patterns: Iterable[str], paths: Iterable[str]) -> None:
    """Raise ValueError, with patterns and some paths, where a pattern matches no path."""
    found = list(paths)
    idle = [p for p in patterns if not any(compiled(p).fullmatch(path) for path in found)]
    if idle:
        raise ValueError(
            f"no layer matches {', '.join(map(repr, idle))}; a pattern is compared with the whole "
            f"path (for a name alone: '.*name'), and the layers are: {list_paths(found)}"
        )
