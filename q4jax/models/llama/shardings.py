"""Where the variables of a Llama go on a mesh."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TypeVar

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from q4jax.nnx.traverse import iter_modules

AXES = ("data", "fsdp", "tensor", "expert")

# Which mesh axis splits what a module computes (its outputs), and what it reads (its inputs).
_COLUMN, _ROW = ("tensor", "fsdp"), ("fsdp", "tensor")
_Axes = str | tuple[str, ...] | None
_MODULES: dict[str, tuple[_Axes, _Axes]] = {
    # Features of looked-up rows would be split over "fsdp", and so would the residual stream then,
    # where it is to be split by batch.
    "embed_tokens": (("tensor", "fsdp"), None),
    "q_proj": _COLUMN,
    "k_proj": _COLUMN,
    "v_proj": _COLUMN,
    "o_proj": _ROW,
    "gate_proj": _COLUMN,
    "up_proj": _COLUMN,
    "down_proj": _ROW,
    "lm_head": _COLUMN,
    "gate": (None, None),
    "shared_expert_gate": (None, None),
}
_MATRICES = ("packed", "absmax", "embedding", "kernel")
_REPLICATED = ("scale", "bias", "nested_absmax", "offset")
# Between a module and the arrays of its weight, where it is in 4 bits or has adapters.
_INNER = ("weight", "quant_state", "base")
M = TypeVar("M")


@dataclasses.dataclass(frozen=True)
class LlamaShardings:
    """The `sharding=` of `from_pretrained` that its `mesh=` stands for.

    Called with the name of a variable and its `jax.ShapeDtypeStruct`, it returns a `NamedSharding`.
    Projections of the residual stream (q, k, v, gate, up, the head) have their outputs over
    "tensor" and their inputs over "fsdp"; o and down, which write to the stream, the other way
    round; the embedding has its vocabulary over both. Inputs are split between blocks: where
    "fsdp" or "tensor" does not divide their number, it splits the outputs as well. The codes of a
    4-bit weight are split as its scales, and as the kernel before it is quantized. Experts are over
    "expert". An adapter has its layer's outputs or inputs over "tensor" where the layer has, which
    is where a step of training would put it. Double quantization's own scales, norms, biases and
    routers are replicated, everything is over "data", and the axis of layers is not split.

    Args:
      mesh: its axes are among "data", "fsdp", "tensor" and "expert", in any order, and of the type
        `Auto`.
      blocksize: of the 4-bit weights.

    Raises:
      TypeError: `mesh` is not a `jax.sharding.Mesh`.
      ValueError: it has no axis, or one of another name. When called: a name that is none of a
        Llama's; a variable that an axis does not divide into equal parts of whole blocks.
      NotImplementedError: it has explicit or manual axes.

    Example:
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
            raise ValueError(f"mesh has the axes {names}; those known are {AXES}")
        if any(kind != AxisType.Auto for kind in self.mesh.axis_types):
            raise NotImplementedError(
                f"mesh has axes of the types {self.mesh.axis_types}; models run on Auto ones: "
                f"jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * {len(names)})"
            )

    def __call__(self, name: str, array: jax.ShapeDtypeStruct) -> NamedSharding:
        """The sharding of the variable `name`; errors as the class documents them."""
        *path, leaf = name.split(".")
        leaf = leaf.partition("__")[0]  # without the tag that the key of a 4-bit leaf carries
        path = [part for part in path if part not in _INNER]
        module = path[-1] if path else ""
        if leaf in _REPLICATED:
            return NamedSharding(self.mesh, PartitionSpec())
        if leaf in ("lora_a", "lora_b") and module in _MODULES:
            return self._adapter(leaf == "lora_b", module, array)
        if leaf not in _MATRICES or module not in _MODULES:
            raise ValueError(f"{name} is no variable of a Llama: LlamaShardings has no rule for it")
        lead: tuple[str | None, ...] = (None,) * ("layers" in path)
        if "experts" in path:
            experts = self._known("expert")
            self._require(name, experts, array.shape[len(lead)], "experts")
            lead = (*lead, *(experts or (None,)))
        outputs, inputs = map(self._known, _MODULES[module])
        shape = array.shape[len(lead) :]
        if len(shape) == 1:
            return self._flat(name, outputs + inputs)
        rows, columns = shape[::-1] if leaf == "kernel" else shape
        # Blocks for a kernel too: it may be quantized where it lies.
        unit = {"packed": self.blocksize // 2, "kernel": self.blocksize}.get(leaf, 1)
        blocks = columns // unit if columns % unit == 0 else columns
        if blocks % self._size(inputs):
            # "tensor" before "fsdp": over which the batch is split, and weights are gathered.
            both = tuple(axis for axis in ("tensor", "fsdp") if axis in outputs + inputs)
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
        """Where a batch goes: its first axis over "data" and "fsdp"."""
        return NamedSharding(self.mesh, PartitionSpec(self._known(("data", "fsdp")) or None))

    def _adapter(self, second: bool, module: str, array: jax.ShapeDtypeStruct) -> NamedSharding:
        """Of the factor [..., in, rank], or of the second one, [..., rank, out]."""
        # The first factor of a layer that reads split features adds to the layer's own sum; the
        # second one of a layer that computes some of its outputs does for the same outputs.
        axes = self._known("tensor") if _MODULES[module] == (_COLUMN if second else _ROW) else ()
        axis = array.ndim - 1 - (not second)
        if not axes or array.shape[axis] % self._size(axes):
            return NamedSharding(self.mesh, PartitionSpec())
        return NamedSharding(self.mesh, PartitionSpec(*(None,) * axis, *axes))

    def _known(self, axes: _Axes) -> tuple[str, ...]:
        """Those that the mesh has."""
        names = (axes,) if isinstance(axes, str) else axes or ()
        return tuple(name for name in names if name in self.mesh.axis_names)

    def _size(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def place(self, tree: M, wrt: nnx.filterlib.Filter = ...) -> M:
        """Moves the variables of a Llama, or of its optimizer, to where the rules put them.

        In a jitted step of training, after the update, it keeps what was updated there: the
        compiler may put results elsewhere, and the next step would be another program.

        Args:
          tree: an nnx module; its variables are replaced in place, one after the other. An abstract
            one, of `jax.ShapeDtypeStruct`s, is told where they belong.
          wrt: which of them, as `nnx.state` takes it: `nnx.LoRAParam` for a model's adapters.

        Returns:
          The same module.
        """
        for path, variable in nnx.to_flat_state(nnx.state(tree, wrt)):
            array = variable.get_value()
            if array.ndim:
                sharding = self(".".join(map(str, path)), array)
            else:
                sharding = NamedSharding(self.mesh, PartitionSpec())
            if isinstance(array, jax.ShapeDtypeStruct):
                moved = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
            elif isinstance(array, jax.core.Tracer):
                moved = jax.lax.with_sharding_constraint(array, sharding)
            else:
                moved = jax.device_put(array, sharding)
            placed = variable.replace(moved)
            nnx.update(tree, nnx.from_flat_state([(path, placed)]))
        return tree

    def check(self, model: nnx.Module, blocksizes: Mapping[str, int]) -> None:
        """ValueError where a call would raise it, before anything is read.

        Args:
          model: an abstract Llama in full precision.
          blocksizes: of the layers whose weight will be in 4 bits, by path.
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
                        f"{self.blocksize}: its scales would lie as {found[0].spec} and its codes "
                        f"as {found[1].spec}; pass sharding=LlamaShardings(mesh, blocksize=...)"
                    )

    def _require(self, name: str, axes: tuple[str, ...], size: int, what: str) -> None:
        """ValueError unless the axes divide `size`."""
        if size % self._size(axes):
            raise ValueError(
                f"{name} has {size} {what}, which the mesh axis {'+'.join(axes)!r} of size "
                f"{self._size(axes)} does not divide"
            )

    def _flat(self, name: str, axes: tuple[str, ...]) -> NamedSharding:
        """Codes or scales in one row, of a weight whose rows are no whole number of blocks."""
        if self._size(axes) > 1:
            raise ValueError(
                f"{name} is flat, as its in_features are no multiple of its blocksize: the mesh "
                f"axis {'+'.join(axes)!r} of size {self._size(axes)} does not divide it"
            )
        return NamedSharding(self.mesh, PartitionSpec())
