"""PEFT's `adapter_config.json` of LoRA adapters."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from q4jax.interop.peft.patterns import check_pattern, is_named, lookup

# Entries that change the computation or the files and are not implemented.
_UNSUPPORTED = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config"),
    *("layer_replication", "lora_bias", "megatron_config", "monteclora_config"),
    *("trainable_token_indices", "use_bdlora", "use_qalora", "velora_config"),
)
# Entries that only matter when an adapter is created, or repeat the names of its tensors.
_IGNORED = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules"),
    *("inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config"),
    *("megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config"),
    # The orientation of the base's kernels, which the files do not hold.
    *("task_type", "target_modules", "fan_in_fan_out"),
}
_READ = {
    *("alpha_pattern", "bias", "ensure_weight_tying", "init_lora_weights", "lora_alpha"),
    *("lora_dropout", "modules_to_save", "peft_type", "r", "rank_pattern", "target_parameters"),
    *("use_dora", "use_rslora"),
}
# Initializations that keep the base weights; "pissa" and others subtract from them.
_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Ranks and scales of the LoRA adapters of a model.

    Attributes:
      rank: inner width of the adapters.
      alpha: numerator of their scale.
      rslora: whether the scale is `alpha / sqrt(rank)` instead of `alpha / rank`.
      dropout: dropout rate of an adapter's input in training.
      ranks: ranks of single modules, by name or regular expression.
      alphas: alphas of single modules, by name or regular expression.
      parameters: names of parameters that have an adapter (`target_parameters`).
      saved: names of modules whose own weights are in the files (`modules_to_save`).
      dora: whether the adapters have magnitudes (`use_dora`).
      tied: whether a head that shares the embedding's weight shares its adapter
        (`ensure_weight_tying`).
    """

    rank: int
    alpha: float
    rslora: bool = False
    dropout: float = 0.0
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alphas: Mapping[str, float] = dataclasses.field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    dora: bool = False
    tied: bool = False

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's adapter, by PEFT's dotted name."""
        return int(lookup(self.ranks, self._key(module), self.rank))

    def alpha_of(self, module: str) -> float:
        """Return the alpha of a module's adapter, by PEFT's dotted name."""
        return float(lookup(self.alphas, self._key(module), self.alpha))

    def _key(self, module: str) -> str:
        """The name that PEFT compares with the patterns: the parameter's, where that is adapted."""
        weight = f"{module}.weight"
        return weight if is_named(weight, self.parameters) else module

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "AdapterConfig":
        """Parse the content of an `adapter_config.json`.

        Raises:
          NotImplementedError: the method is not LoRA, or a variant that is not implemented.
          ValueError: an entry is unknown and set, or has the wrong type.

        Examples:
          >>> AdapterConfig.from_json({"peft_type": "LORA", "r": 8, "lora_alpha": 16}).rank
          8
        """
        if config.get("peft_type") != "LORA":
            raise NotImplementedError(f"peft_type {config.get('peft_type')!r}: only LORA is read")
        for key in _UNSUPPORTED:
            if config.get(key):
                raise NotImplementedError(f"{key}={config[key]!r} is not implemented")
        if config.get("bias", "none") != "none":
            raise NotImplementedError(f"bias={config['bias']!r}: only 'none' is implemented")
        init = config.get("init_lora_weights", True)
        if not any(init is known or init == known for known in _INITIALIZATIONS):
            raise NotImplementedError(
                f"init_lora_weights={init!r} changes the base weights, which is not implemented"
            )
        known = {*_UNSUPPORTED, *_IGNORED, *_READ}
        unknown = sorted(k for k, value in config.items() if k not in known and value)
        if unknown:
            raise ValueError(f"unknown entries in an adapter config: {unknown}")
        return cls(
            rank=_rank("r", config.get("r", 8)),
            alpha=_number("lora_alpha", config.get("lora_alpha", 8)),
            rslora=_flag("use_rslora", config.get("use_rslora", False)),
            dropout=_dropout(config.get("lora_dropout", 0.0)),
            ranks=_patterns("rank_pattern", config.get("rank_pattern"), _rank),
            alphas=_patterns("alpha_pattern", config.get("alpha_pattern"), _number),
            parameters=_names("target_parameters", config.get("target_parameters")),
            saved=_names("modules_to_save", config.get("modules_to_save")),
            dora=_flag("use_dora", config.get("use_dora") or False),
            tied=_flag("ensure_weight_tying", config.get("ensure_weight_tying") or False),
        )

    def to_json(
        self, targets: list[str], base: str | None, revision: str | None = None
    ) -> dict[str, Any]:
        """Return the content of an `adapter_config.json` that PEFT reads.

        Args:
          targets: last names of the adapted modules.
          base: name of the base model, or None.
          revision: that of the base, or None.
        """
        optional: dict[str, Any] = {}
        if self.parameters:
            optional["target_parameters"] = list(self.parameters)
        if self.tied:
            optional["ensure_weight_tying"] = True
        return {
            "alpha_pattern": dict(self.alphas),
            "base_model_name_or_path": base,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "modules_to_save": list(self.saved) or None,
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": dict(self.ranks),
            "revision": revision,
            "target_modules": targets,
            "task_type": "CAUSAL_LM",
            "use_dora": self.dora,
            "use_rslora": self.rslora,
            **optional,
        }


def _patterns(name: str, value: Any, check: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, got {value!r}")
    return {
        check_pattern(name, key): check(f"{name} of {key}", entry) for key, entry in value.items()
    }


def _names(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ValueError(f"{name} must be a list of names, got {value!r}")
    return tuple(value)


def _rank(name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= 2**20:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def _number(name: str, value: Any) -> float:
    # An int may be larger than any float, which isfinite cannot tell.
    if type(value) not in (int, float) or not abs(value) < 2**1023:  # nor is NaN
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    number: float = value
    return number


def _flag(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def _dropout(value: Any) -> float:
    number = _number("lora_dropout", value)
    if not 0 <= number < 1:
        raise ValueError(f"lora_dropout must be at least 0 and below 1, got {value!r}")
    return number
