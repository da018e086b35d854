"""Group the layers of a decoder into stacks that a scan runs over.

Layers that repeat with a period form one group: a stack for each run of equal layers in the period.
A model whose layers are all alike has one group of one stack.
"""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from q4jax.models.decoder.spec import Layer

# A longer period would save no programs: Jamba's and Gemma's are 8 and 6.
_LONGEST_PERIOD = 12


@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers of one description, whose variables have an axis of layers in front.

    Attributes:
      name: `layers` where all layers are in one stack, else `layers.from_3` for that whose first
        layer is number 3.
      numbers: the layers' numbers.
      layer: their description.
      run: how many of them follow each other in each period.
    """

    name: str
    numbers: tuple[int, ...]
    layer: Layer
    run: int = 1


def group_layers(
    layers: Sequence[Layer], kinds: Sequence[Hashable] | None = None
) -> tuple[tuple[Stack, ...], ...]:
    """Return groups of stacks; those of a group are run in turn, a run of each, period by period.

    Args:
      layers: descriptions of the layers.
      kinds: what else must be equal within a stack, one for each layer.

    Examples:
      >>> from q4jax.models import LlamaConfig
      >>> [layer] = set(LlamaConfig(64, 32, 48, 6, 4, 4, 8).decoder.layers)
      >>> groups = group_layers([layer] * 6, kinds="aabaab")
      >>> [[(stack.name, stack.numbers) for stack in group] for group in groups]
      [[('layers.from_0', (0, 1, 3, 4)), ('layers.from_2', (2, 5))]]
    """
    keys: list[Any] = list(zip(layers, kinds or [None] * len(layers), strict=True))
    groups, first = [], 0
    while first < len(keys):
        period, repeats = _best_period(keys[first:])
        end, start, group = first + period * repeats, first, []
        while start < first + period:
            run = _repeats(keys[start : first + period], 1) if period > 1 else 1
            numbers = (at + i for at in range(start, end, period) for i in range(run))
            group.append(Stack(f"layers.from_{start}", tuple(numbers), layers[start], run))
            start += run
        groups.append(tuple(group))
        first = end
    if len(groups) == 1 and len(groups[0]) == 1:
        return ((dataclasses.replace(groups[0][0], name="layers"),),)
    return tuple(groups)


def kinds_of_stacks(sizes: Mapping[int, int]) -> list[int] | None:
    """Return kinds for which `group_layers` makes the stacks of these sizes; None: nothing does.

    Args:
      sizes: the number of layers of each stack, by the number of its first layer.

    Examples:
      >>> kinds_of_stacks({0: 4, 2: 2, 6: 3})
      [0, 0, 2, 0, 0, 2, 6, 6, 6]
    """
    kinds: list[int] = []
    starts = sorted(sizes)
    while starts:
        end = len(kinds)
        group: list[int] = []
        # The stacks of a group begin in its first period, and the next group where they all end.
        while starts and (not group or starts[0] < end):
            group.append(starts.pop(0))
            end += sizes[group[-1]]
        repeats = 1 if len(group) == 1 else sizes[group[0]] // (group[1] - group[0])
        runs = [(start, sizes[start] // max(repeats, 1)) for start in group]
        kinds += [start for _ in range(repeats) for start, run in runs for _ in range(run)]
        if len(kinds) != end:
            return None
    found = {start: number for number, start in reversed(list(enumerate(kinds)))}
    return kinds if found == {start: start for start in sizes} else None


def _best_period(keys: list[Any]) -> tuple[int, int]:
    """Return the period and repeats that cover most of the layers; of equals, the shortest."""
    best = (1, _repeats(keys, 1))
    for period in range(2, min(_LONGEST_PERIOD, len(keys) // 2) + 1):
        repeats = _repeats(keys, period)
        if repeats > 1 and period * repeats > best[0] * best[1]:
            best = (period, repeats)
    return best


def _repeats(keys: list[Any], period: int) -> int:
    count = 1
    while keys[count * period : (count + 1) * period] == keys[:period]:
        count += 1
    return count
