"""Shardings of a Llama's variables on a mesh."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TypeVar

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from q4jax.nnx.traverse import iter_modules

AXES = ("data", "fsdp", "tensor", "expert")

# Mesh axes of the outputs and of the inputs of each module.
_COLUMN, _ROW = ("tensor", "fsdp"), ("fsdp", "tensor")
_NEITHER = (None, None)
_Axes = str | tuple[str, ...] | None
# Modules that write to the residual stream, under the names of all families.
_WRITERS = [
    "o_proj",
    "out_proj",
    "dense",
    "down_proj",
    "w2",
    "fc2",
    "c_proj",
    "fc_out",
    "dense_4h_to_h",
    "output_linear",
    "per_layer_projection",
]
# Modules whose outputs are few, or which every device needs whole.
_SMALL = [
    "gate",
    "shared_expert_gate",
    "router",
    "layer",
    "wg",
    "in_proj_a",
    "in_proj_b",
    "in_proj_ba",
    "kv_a_proj_with_mqa",
    "q_a_proj",
    "per_layer_input_gate",
    "per_layer_model_projection",
    "conv1d",
]
# Sharded features would propagate to the residual stream, which is to be sharded by batch.
_EMBEDDINGS = ("embed_tokens", "embed_positions", "embed_tokens_per_layer")


def _axes_of(module: str) -> tuple[_Axes, _Axes]:
    """Return the mesh axes of the outputs and of the inputs of a module."""
    if module in _EMBEDDINGS:
        return (("tensor", "fsdp"), None)
    if module in _SMALL:
        return _NEITHER
    return _ROW if module in _WRITERS else _COLUMN


_MATRICES = ("packed", "absmax", "embedding", "kernel")
# Beside norms, biases and statistics: numbers of heads, experts and activations.
_REPLICATED = [
    "scale",
    "bias",
    "lm_head_bias",
    "nested_absmax",
    "offset",
    "sinks",
    "A_log",
    "dt_bias",
    "weight",
    "layer_scalar",
    "e_score_correction_bias",
    "alpha_p",
    "alpha_n",
    "beta",
    "eps",
    "magnitude",
    "count",  # of the random streams of dropout, as is the next
    "key",
]
# Path parts between a module and the arrays of a 4-bit weight or an adapted layer.
_INNER = ("weight", "quant_state", "base")
M = TypeVar("M")


@dataclasses.dataclass(frozen=True)
class LlamaShardings:
    """Sharding rules of a Llama: the `sharding=` of `from_pretrained` that `mesh=` stands for.

    Call it with a variable's name and `jax.ShapeDtypeStruct` to get its `NamedSharding`:

    - Projections that read the residual stream (q, k, v, gate, up, the head) have their outputs
      over "tensor" and their inputs over "fsdp"; o and down, which write to it, the reverse.
    - The embedding has its vocabulary over both axes.
    - A vocabulary that they do not divide is not split, and narrow projections never are, such as
      those of latent attention to its narrow vectors.
    - Inputs are split between blocks. If their number is not divisible, the outputs take both axes.
    - The codes of a 4-bit weight have the sharding of its scales and of the dense kernel.
    - Experts are over "expert".
    - An adapter has its outputs or inputs over "tensor" if its layer has, and is over "expert" if
      its layer is.
    - Norms, biases, routers and the nested scales of double quantization are replicated.
    - Nothing is split over "data", nor along the axis of layers.

    Args:
      mesh: a mesh with axes among "data", "fsdp", "tensor" and "expert", all of type `Auto` or all
        `Explicit`. Explicit ones are for TPUs: make and call the model under `jax.set_mesh(mesh)`.
      blocksize: block size of the 4-bit weights.

    Raises:
      TypeError: `mesh` is not a `jax.sharding.Mesh`.
      ValueError: the mesh has no axis, or one of another name. When called: the name is not that of
        a Llama's variable, or an axis does not divide the variable into equal parts of full blocks.
      NotImplementedError: the mesh has manual axes, or axes of several types.

    Examples:
      >>> import jax, numpy as np, q4jax
      >>> mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("tensor",))
      >>> kernel = jax.ShapeDtypeStruct((2, 64, 128), np.float32)  # [layers, in, out]
      >>> tuple(q4jax.models.LlamaShardings(mesh)("layers.mlp.up_proj.kernel", kernel).spec)
      (None, None, 'tensor')
    """

    mesh: Mesh
    blocksize: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, Mesh):
            raise TypeError(f"mesh must be a jax.sharding.Mesh, got {type(self.mesh).__name__}")
        names = self.mesh.axis_names
        if not names or not set(names) <= set(AXES):
            raise ValueError(f"mesh has the axes {names}; known axes are {AXES}")
        types = self.mesh.axis_types
        if types[0] == AxisType.Manual or len(set(types)) > 1:
            raise NotImplementedError(
                f"mesh has axes of the types {types}; models run on Auto ones, or on Explicit "
                f"ones: jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * {len(names)})"
            )

    def __call__(self, name: str, array: jax.ShapeDtypeStruct) -> NamedSharding:
        """Return the sharding of the variable `name`; raises the class's errors."""
        *path, leaf = name.split(".")
        leaf = leaf.partition("__")[0]  # without the spec tag of a 4-bit leaf's key
        path = [part for part in path if part not in _INNER]
        module = path[-1] if path else ""
        if leaf in _REPLICATED:
            return NamedSharding(self.mesh, PartitionSpec())
        if leaf in ("lora_a", "lora_b") and module:
            return self._adapter(leaf == "lora_b", path, array)
        if leaf not in _MATRICES or not module:
            raise ValueError(
                f"{name} is not a variable of a Llama: LlamaShardings has no rule for it"
            )
        lead: tuple[str | None, ...] = (None,) * ("layers" in path)
        if "experts" in path:
            experts = self._present("expert")
            self._require(name, experts, array.shape[len(lead)], "experts")
            lead = (*lead, *(experts or (None,)))
        outputs, inputs = map(self._present, _axes_of(module))
        shape = array.shape[len(lead) :]
        if len(shape) == 1:
            return self._flat(name, outputs + inputs)
        rows, columns = shape[::-1] if leaf == "kernel" else shape
        may_be_whole = module in (*_EMBEDDINGS, "lm_head")
        if may_be_whole and rows % self._size(outputs):
            outputs = ()
        # A kernel is split between blocks too, since it may be quantized on the mesh.
        unit = {"packed": self.blocksize // 2, "kernel": self.blocksize}.get(leaf, 1)
        blocks = columns // unit if columns % unit == 0 else columns
        if blocks % self._size(inputs):
            # "fsdp" is last, since weights are gathered over it.
            both = tuple(axis for axis in ("tensor", "fsdp") if axis in outputs + inputs)
            if rows % self._size(both) and may_be_whole:
                return NamedSharding(self.mesh, PartitionSpec())
            if rows % self._size(both):
                raise ValueError(
                    f"{name} has {blocks} blocks or features in a row, which the mesh axis "
                    f"{'+'.join(inputs)!r} of size {self._size(inputs)} does not divide, and {rows}"
                    f" rows, which {'+'.join(both)} of size {self._size(both)} do not"
                )
            outputs, inputs = both, ()
        self._require(name, outputs, rows, "rows")
        split = (outputs, inputs)[:: -1 if leaf == "kernel" else 1]
        axes = (axes[0] if len(axes) == 1 else axes or None for axes in split)
        return NamedSharding(self.mesh, PartitionSpec(*lead, *axes))

    @property
    def batch(self) -> NamedSharding:
        """Sharding of a batch: its first axis over "data" and "fsdp"."""
        return NamedSharding(self.mesh, PartitionSpec(self._present(("data", "fsdp")) or None))

    def _adapter(self, second: bool, path: list[str], array: jax.ShapeDtypeStruct) -> NamedSharding:
        """Return the sharding of a first factor [..., in, rank] or a second [..., rank, out]."""
        wanted: dict[int, tuple[str, ...]] = {}
        if "experts" in path:
            wanted[array.ndim - 3] = self._present("expert")
        # The first factor follows the inputs of a row-parallel layer, the second one the outputs of
        # a column-parallel layer.
        if _axes_of(path[-1]) == (_COLUMN if second else _ROW):
            wanted[array.ndim - 1 - (not second)] = self._present("tensor")
        spec: list[str | None] = [None] * array.ndim
        for axis, names in wanted.items():
            if names and array.shape[axis] % self._size(names) == 0:
                (spec[axis],) = names
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def _present(self, axes: _Axes) -> tuple[str, ...]:
        """Return the axes that the mesh has."""
        names = (axes,) if isinstance(axes, str) else axes or ()
        return tuple(name for name in names if name in self.mesh.axis_names)

    def _size(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def place(self, tree: M, wrt: nnx.filterlib.Filter = ...) -> M:
        """Move the variables of a Llama, or of its optimizer, to their shardings.

        Call it at the end of a jitted training step. It pins the updated variables to these
        shardings, so that the next step does not recompile.

        Args:
          tree: an nnx module, whose variables are replaced one after the other. Abstract variables
            (`jax.ShapeDtypeStruct`) get a sharding.
          wrt: filter of the variables, as in `nnx.state`: `nnx.LoRAParam` for a model's adapters.

        Returns:
          The same module.
        """
        explicit = AxisType.Explicit in self.mesh.axis_types
        for path, variable in nnx.to_flat_state(nnx.state(tree, wrt)):
            array = variable.get_value()
            if array.ndim:
                sharding = self(".".join(map(str, path)), array)
            else:
                sharding = NamedSharding(self.mesh, PartitionSpec())
            if isinstance(array, jax.ShapeDtypeStruct):
                moved = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
            elif isinstance(array, jax.core.Tracer):
                move = jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint
                moved = move(array, sharding)
            else:
                moved = jax.device_put(array, sharding)
            placed = variable.replace(moved)
            nnx.update(tree, nnx.from_flat_state([(path, placed)]))
        return tree

    def check(self, model: nnx.Module, blocksizes: Mapping[str, int]) -> None:
        """Raise the ValueError that a call would, before any weight is read.

        Args:
          model: an abstract Llama in full precision.
          blocksizes: block size of each layer that will be 4-bit, by path.
        """
        for path, module in iter_modules(model):
            for leaf, variable in vars(module).items():
                if not isinstance(variable, nnx.Param):
                    continue
                name, shape = f"{path}.{leaf}", variable.shape
                if leaf != "kernel" or path not in blocksizes:
                    self(name, jax.ShapeDtypeStruct(shape, variable.dtype))
                    continue
                *lead, inputs, outputs = shape
                blocks, rest = divmod(inputs, blocksizes[path])
                scales = (*lead, outputs * inputs) if rest else (*lead, outputs, blocks)
                codes = scales if rest else (*lead, outputs, inputs // 2)
                found = [
                    self(f"{path}.weight.{part}", jax.ShapeDtypeStruct(shape, variable.dtype))
                    for part, shape in (("absmax", scales), ("packed", codes))
                ]
                if found[0].spec != found[1].spec:
                    raise ValueError(
                        f"{path} has blocks of {blocksizes[path]}, the rules are for "
                        f"{self.blocksize}: its scales would have {found[0].spec} and its codes "
                        f"{found[1].spec}; pass sharding=LlamaShardings(mesh, blocksize=...)"
                    )

    def _require(self, name: str, axes: tuple[str, ...], size: int, what: str) -> None:
        """Raise ValueError unless the axes divide `size`."""
        if size % self._size(axes):
            raise ValueError(
                f"{name} has {size} {what}, which the mesh axis {'+'.join(axes)!r} of size "
                f"{self._size(axes)} does not divide"
            )

    def _flat(self, name: str, axes: tuple[str, ...]) -> NamedSharding:
        """Return the sharding of flat codes or scales, which cannot be split."""
        if self._size(axes) > 1:
            raise ValueError(
                f"{name} is flat since its in_features are not a multiple of its blocksize: the "
                f"mesh axis {'+'.join(axes)!r} of size {self._size(axes)} does not divide it"
            )
        return NamedSharding(self.mesh, PartitionSpec())
