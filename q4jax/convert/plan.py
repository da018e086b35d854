"""What is done with each layer of a model, and why."""

import dataclasses
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from q4jax.convert.rules import EVERY, QuantRule, Rules

_logger = logging.getLogger("q4jax")


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a layer becomes 4-bit.

    Attributes:
      why_not: why this one cannot, or None.
      quantize: (module, path, settings) to the new module; None where why_not says so always.
      embedding: it is one, so that a rule must ask for it.
    """

    why_not: str | None
    quantize: Callable[[Any, str, dict[str, Any]], Any] | None = None
    embedding: bool = False


@dataclasses.dataclass(frozen=True)
class Decision:
    """What `quantize_model` does with one layer, and why where it leaves it alone.

    `unserved`: it is a layer that multiplies, nothing asked to keep it, and yet it is kept.
    """

    path: str
    layer: str
    quantize: bool
    reason: str = ""
    unserved: bool = False
    rule: QuantRule | None = None

    def __str__(self) -> str:
        verdict = "quantized" if self.quantize else f"kept: {self.reason}"
        return f"{self.path or '(root)'} ({self.layer}): {verdict}"


class Plan(list[Decision]):
    """The decisions for all layers of a model, in its order; prints one a line."""

    @property
    def quantized(self) -> list[Decision]:
        """Those that become 4-bit."""
        return [decision for decision in self if decision.quantize]

    @property
    def kept(self) -> list[Decision]:
        """Those that are left alone, each with its reason."""
        return [decision for decision in self if not decision.quantize]

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def decide(path: str, layer: str, kind: Kind, rules: Rules) -> Decision:
    """What the rules say of a layer; ValueError where one names what cannot be quantized."""
    rule, reason = rules.choose(path)
    if rule is None:
        return Decision(path, layer, False, reason)
    if kind.embedding and not rule.embeddings:
        reason = "an embedding; QuantRule(embeddings=True) takes it"
        return Decision(path, layer, False, reason)
    if kind.why_not is None:
        return Decision(path, layer, True, rule=rule)
    if rule.pattern != EVERY:
        raise ValueError(
            f"rule {rule.pattern!r} matches {path} ({layer}), which cannot be quantized: "
            f"{kind.why_not}"
        )
    return Decision(path, layer, False, kind.why_not, unserved=kind.quantize is not None)


def report(decisions: Sequence[Decision]) -> None:
    """Logs what happens to each layer and why; ValueError where none is quantized."""
    if not any(decision.quantize for decision in decisions):
        found = "; ".join(map(str, decisions)) or "it has no layer with a weight"
        raise ValueError(f"quantize_model matched no layer of the model: {found}")
    for decision in decisions:
        _logger.info("%s", decision)
    unserved = [decision for decision in decisions if decision.unserved]
    if unserved:
        warnings.warn("not quantized: " + "; ".join(map(str, unserved)), stacklevel=3)
