"""Where an op's operands lie, as a caller on Auto axes tells it."""

import dataclasses

import pytest

from q4jax.core.placed_spec import PlacedSpec
from q4jax.core.spec import QuantSpec
from q4jax.ops.weight_sharding import WeightAxes, local_spec, placement_of
from q4jax.sharding.axes import Placement
from q4jax.sharding.op import Shard

SPEC = QuantSpec("nf4", 64, 256, "float32", (128, 256))
AXES = (("expert",), ("tensor",), ("fsdp",))  # experts, rows, columns


@pytest.mark.parametrize(
    ("lead", "contraction", "batch", "weight", "others"),
    [
        # The batch takes "fsdp", over which the codes are gathered.
        (0, "in", ("fsdp",), {"out": ("tensor",), "in": ("fsdp",)}, {"in": ()}),
        (0, "out", ("fsdp",), {"out": ("tensor",), "in": ("fsdp",)}, {"out": ("tensor",)}),
        # A whole batch leaves it to the columns.
        (0, "in", (), {"out": ("tensor",), "in": ("fsdp",)}, {"in": ("fsdp",)}),
        (
            1,
            "in",
            ("fsdp",),
            {"lead0": ("expert",), "out": ("tensor",), "in": ("fsdp",)},
            {"lead0": ("expert",), "in": ()},
        ),
    ],
)
def test_mesh_axes_of_labels(lead, contraction, batch, weight, others):
    packed = WeightAxes.from_spec(SPEC, lead, nested=True).packed
    found = Placement(AXES, batch).of_labels(packed, contraction)
    assert found == (weight, {"batch0": batch, **others})


def test_a_description_with_a_place():
    placed = PlacedSpec.of(SPEC, AXES, ("fsdp",))
    assert placed.tag() == SPEC.tag() and placed != SPEC
    assert placement_of(placed) == Placement(AXES, ("fsdp",))
    assert placement_of(SPEC) is None
    part = local_spec(Shard({"out": ("tensor",)}, {"tensor": 2}), placed)
    assert part == dataclasses.replace(placed, shape=(64, 256))
