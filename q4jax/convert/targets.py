"""Which layers get an adapter, by names, by paths or by a regular expression."""

from collections.abc import Mapping, Sequence

from q4jax.convert.rules import compiled, require_matches

Targets = str | Sequence[str] | None


def choose_targets(layers: Mapping[str, bool], targets: Targets) -> set[str]:
    """Return the paths of the layers that get an adapter.

    Args:
      layers: the dotted paths of the layers that can have one, and whether they have one without
        targets.
      targets: as for `add_lora`.

    Raises:
      ValueError: a target matches no layer (the error names the layers); a regular expression is
        none.
    """
    if targets in ("all-linear", ["all-linear"], ("all-linear",)):
        raise ValueError(
            f"targets={targets!r}: leave targets out for every layer with a 4-bit weight but "
            f"embeddings, or give '.*' for every layer"
        )
    if isinstance(targets, str):
        require_matches([targets], layers)
        return {path for path in layers if compiled(targets).fullmatch(path)}
    idle: list[str] = []
    if targets is None:
        chosen = {path for path, default in layers.items() if default}
    else:
        under = {t: {p for p in layers if f".{t}." in f".{p}."} for t in targets}
        chosen = set().union(*under.values())
        idle = [target for target, paths in under.items() if not paths]
    if idle or not chosen:
        missed = f"; no layer is {idle}" if idle else ""
        if targets is None and layers:
            missed = "; without targets, layers with a 4-bit weight have adapters (quantize_model)"
        raise ValueError(
            f"add_lora matched no layer: targets={targets!r}{missed}; layers that can have an "
            f"adapter: {[path or '(root)' for path in layers]}"
        )
    return chosen


def check_adapter(rank: int, dropout: float = 0.0) -> None:
    """Raise ValueError unless rank and dropout are allowed."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a positive integer, got {rank!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout!r}")
