"""`Plan`: what `quantize_model` does with each layer of a model, and why."""

import dataclasses
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from q4jax.convert.rules import EVERY, QuantRule, Rules
from q4jax.core.html import html_table

_logger = logging.getLogger("q4jax")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """How one layer becomes 4-bit.

    Attributes:
      unsupported_reason: why this layer cannot, or None.
      quantize: a function from (module, path, settings) to the new module; None where no layer of
        the class can.
      is_embedding: whether it is an embedding, which a rule must ask for.
    """

    unsupported_reason: str | None
    quantize: Callable[[Any, str, dict[str, Any]], Any] | None = None
    is_embedding: bool = False


@dataclasses.dataclass(frozen=True)
class Decision:
    """What `quantize_model` does with one layer.

    Attributes:
      path: the layer's dotted path.
      layer: the name of its class.
      quantize: whether it becomes 4-bit.
      reason: why it is kept.
      unsupported: whether it is a matmul layer that no rule excludes but q4jax cannot quantize;
        there is a warning about it.
      rule: the rule by which it becomes 4-bit.
    """

    path: str
    layer: str
    quantize: bool
    reason: str = ""
    unsupported: bool = False
    rule: QuantRule | None = None

    @property
    def verdict(self) -> str:
        """What happens to the layer, with the reason where it is kept."""
        return "quantized" if self.quantize else f"kept: {self.reason}"

    def __str__(self) -> str:
        return f"{self.path or '(root)'} ({self.layer}): {self.verdict}"


class Plan(list[Decision]):
    """The decisions for all layers of a model, in the model's order; prints one a line."""

    @property
    def quantized(self) -> list[Decision]:
        """The decisions for layers that become 4-bit."""
        return [decision for decision in self if decision.quantize]

    @property
    def kept(self) -> list[Decision]:
        """The decisions for layers that are kept, with their reasons."""
        return [decision for decision in self if not decision.quantize]

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    def _repr_html_(self) -> str:
        rows = [(d.path or "(root)", d.layer, d.verdict) for d in self]
        return html_table(("path", "layer", "verdict"), rows)


def make_decision(path: str, layer: str, conversion: Conversion, rules: Rules) -> Decision:
    """Apply the rules to a layer; ValueError where one names a layer that cannot be quantized."""
    rule, reason = rules.choose(path)
    if rule is None:
        return Decision(path, layer, False, reason)
    if conversion.is_embedding and not rule.embeddings:
        reason = "an embedding; QuantRule(embeddings=True) takes it"
        return Decision(path, layer, False, reason)
    unsupported = conversion.unsupported_reason
    if unsupported is None:
        return Decision(path, layer, True, rule=rule)
    if rule.pattern != EVERY:
        raise ValueError(
            f"rule {rule.pattern!r} matches {path} ({layer}), which cannot be quantized: "
            f"{unsupported}"
        )
    return Decision(path, layer, False, unsupported, conversion.quantize is not None)


def report(decisions: Sequence[Decision]) -> None:
    """Log each decision; ValueError where no layer becomes 4-bit."""
    if not any(decision.quantize for decision in decisions):
        found = "; ".join(map(str, decisions)) or "it has no layer with a weight"
        raise ValueError(f"quantize_model matched no layer of the model: {found}")
    for decision in decisions:
        _logger.info("%s", decision)
    unsupported = [decision for decision in decisions if decision.unsupported]
    if unsupported:
        warnings.warn("not quantized: " + "; ".join(map(str, unsupported)), stacklevel=3)
