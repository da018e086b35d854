"""PEFT's names of modules, and the layers of a model that they mean."""

import itertools
from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

Index = tuple[int, ...]
# Path of a stack of layers -> the name of the list of layers, and the numbers of those in it.
Stacks = Mapping[str, tuple[str, tuple[int, ...]]]

EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
"""The parameters in which transformers stacks experts, in the order of its modules.

PEFT wraps a module once for each parameter that it adapts, the first of them innermost.
"""
EXPERT_LAYERS = ("gate_proj", "up_proj", "down_proj")
"""The layers whose kernels are stacked in these parameters; the first two share one.

A model may also have layers that are these parameters, such as gpt-oss."""
ROUTERS = ("gate",)
"""Modules whose weight is a parameter of a class of its own in transformers, no linear layer."""
HEADS = ("lm_head", "score", "classifier", "qa_outputs", "embed_out")
"""The modules that transformers keeps beside the base model, so that they have no prefix."""

_GRANITE = {"input_linear": "gate_up_proj", "output_linear": "down_proj"}
# Llama 4's experts do not tell PEFT that they are `[in, out]`, so its two factors change places.
_EXCHANGED = "feed_forward.experts"
# Names that transformers had for a Mixtral's modules before it stacked the experts.
_FORMER = {"block_sparse_moe": "mlp", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


class Place(NamedTuple):
    """A module of the model: its path, and the leading indices of its weights."""

    path: str
    at: Index


def stacks_of(model: Any) -> Stacks:
    """Return what a model says of its stacks: a decoder of `q4jax.models` has `checkpoint_stacks`.

    Other models have one stack for the layers of a list, which the names tell.
    """
    found: Stacks = getattr(model, "checkpoint_stacks", {})
    return found


def locate(name: str, prefix: str, paths: Container[str], stacks: Stacks) -> Place | None:
    """Return which of the paths a module's name means; None if none.

    Numbers in the name are parts of the path, as in lists, or indices of a stack of layers.
    """
    for path, (base, numbers) in stacks.items():
        number, _, tail = name.removeprefix(f"{base}.").partition(".")
        if not name.startswith(f"{base}.") or not number.isdecimal() or len(number) > 6:
            continue
        found = _search([path, *tail.split(".")], paths) if int(number) in numbers else None
        if found is not None:
            return Place(found.path, (numbers.index(int(number)), *found.at))
    return _search(name.removeprefix(prefix).split("."), paths)


def _search(parts: list[str], paths: Container[str]) -> Place | None:
    for spelled in (parts, [_FORMER.get(part, part) for part in parts]):
        numbers = [i for i, part in enumerate(spelled) if part.isdecimal() and len(part) < 7][:4]
        for count in range(len(numbers) + 1):
            for dropped in itertools.combinations(numbers, count):
                path = ".".join(p for i, p in enumerate(spelled) if i not in dropped)
                if path in paths:
                    return Place(path, tuple(int(spelled[i]) for i in dropped))
    return None


def numbered(
    path: str, lead: Index, stack: str, stacks: Stacks, prefix: str
) -> Iterator[tuple[str, Index]]:
    """Yield the name of each layer of a stack, and its leading index.

    Args:
      path: path of the module, with the prefix of its names.
      lead: the leading axes of the stack.
      stack: the part of the path that numbers follow, where `stacks` does not tell.
      stacks: what the model says of its stacks.
      prefix: start of the names that the paths lack.

    Raises:
      ValueError: the path has no part `stack` to number.
    """
    if not lead:
        yield path, ()
        return
    own = path.removeprefix(prefix)
    for name, (base, numbers) in stacks.items():
        if own.startswith(f"{name}.") and lead == (len(numbers),):
            for i, number in enumerate(numbers):
                yield f"{base}.{number}.{own.removeprefix(f'{name}.')}", (i,)
            return
    head, mark, tail = f".{path}.".partition(f".{stack}.")
    if not mark or len(lead) > 1:
        raise ValueError(
            f"{path} has the leading axes {lead}, but no part {stack!r} for each to number: pass "
            f"stack="
        )
    for i in range(lead[0]):
        yield f"{head}.{stack}.{i}.{tail}".strip("."), (i,)


def with_prefix(path: str, prefix: str) -> str:
    """Return the name of a module in the files; heads are outside the base model."""
    return path if path.split(".")[0] in HEADS else f"{prefix}{path}"


def expert_layer(path: str) -> str:
    """Return the name of a layer of stacked experts, as transformers has it; else ""."""
    *_, parent, leaf = ("", "", *path.split("."))
    leaf = _GRANITE.get(leaf, leaf)
    return leaf if parent == "experts" and leaf in (*EXPERT_LAYERS, *EXPERT_PARAMETERS) else ""


def split_experts(
    a: np.ndarray, b: np.ndarray, rank: int, module: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return `[experts, in, rank]` and `[experts, rank, out]` of a parameter of experts."""
    first = a.reshape(-1, rank, a.shape[1])
    second = b.reshape(b.shape[0], rank, -1).transpose(2, 0, 1)
    if module.endswith(_EXCHANGED):
        return second, first
    return first.transpose(0, 2, 1), second.transpose(0, 2, 1)


def join_experts(a: np.ndarray, b: np.ndarray, module: str) -> tuple[np.ndarray, np.ndarray]:
    """Invert `split_experts`."""
    if module.endswith(_EXCHANGED):
        first, second = b, a
    else:
        first, second = a.transpose(0, 2, 1), b.transpose(0, 2, 1)
    experts, rank, inputs = first.shape
    return (
        first.reshape(experts * rank, inputs),
        second.transpose(1, 2, 0).reshape(-1, rank * experts),
    )
