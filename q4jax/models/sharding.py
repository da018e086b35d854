"""Where the variables of a Llama go on a mesh."""

import dataclasses
from collections.abc import Mapping

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from q4jax.walk import walk_modules

AXES = ("data", "fsdp", "tensor")

# Which mesh axis splits what a module computes (its outputs), and what it reads (its inputs).
_COLUMN, _ROW = ("tensor", "fsdp"), ("fsdp", "tensor")
_MODULES = {
    "embed_tokens": _COLUMN,
    "q_proj": _COLUMN,
    "k_proj": _COLUMN,
    "v_proj": _COLUMN,
    "o_proj": _ROW,
    "gate_proj": _COLUMN,
    "up_proj": _COLUMN,
    "down_proj": _ROW,
    "lm_head": _COLUMN,
}
# What the axes of a leaf count: the first of outputs and the second of inputs, but for a kernel.
_MATRICES = {
    "packed": ("rows", "bytes a row"),
    "absmax": ("rows", "blocks a row"),
    "embedding": ("rows", "columns"),
    "kernel": ("inputs", "outputs"),
}
_REPLICATED = ("scale", "bias", "nested_absmax", "offset")


@dataclasses.dataclass(frozen=True)
class LlamaShardings:
    """The `sharding=` of `from_pretrained` that its `mesh=` stands for.

    Called with the name of a variable and its `jax.ShapeDtypeStruct`, it returns a `NamedSharding`.
    Projections of the residual stream (q, k, v, gate, up, the head) and the embedding have their
    outputs (its vocabulary) over "tensor" and their inputs (its features) over "fsdp"; o and down,
    which write to the stream, the other way round. The codes of a 4-bit weight are split as its
    scales, and whole blocks stay together. Double quantization's own scales, norms and biases are
    replicated, everything is over "data", and the axis of layers is not split.

    Args:
      mesh: its axes are among "data", "fsdp" and "tensor", in any order, and of the type `Auto`.

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
        *path, leaf = name.removeprefix("layers.").replace(".weight.", ".").split(".")
        module = path[-1] if path else ""
        if leaf in _REPLICATED:
            return NamedSharding(self.mesh, PartitionSpec())
        if leaf not in _MATRICES or module not in _MODULES:
            raise ValueError(f"{name} is no variable of a Llama: LlamaShardings has no rule for it")
        lead = (None,) * name.startswith("layers.")
        axes = _MODULES[module][:: -1 if leaf == "kernel" else 1]
        found = tuple(axis if axis in self.mesh.axis_names else None for axis in axes)
        shape = array.shape[len(lead) :]
        if len(shape) == 1:
            return self._flat(name, found)
        for axis, size, what in zip(found, shape, _MATRICES[leaf], strict=True):
            if axis is not None and size % self.mesh.shape[axis]:
                raise ValueError(
                    f"{name} has {size} {what}, which the mesh axis {axis!r} of size "
                    f"{self.mesh.shape[axis]} does not divide"
                )
        return NamedSharding(self.mesh, PartitionSpec(*lead, *found))

    def check(self, model: nnx.Module, blocksizes: Mapping[str, int]) -> None:
        """ValueError where a call would raise it, before anything is read.

        Args:
          model: an abstract Llama in full precision.
          blocksizes: of the layers whose weight will be in 4 bits, by path.
        """
        for path, module in walk_modules(model):
            for leaf, variable in vars(module).items():
                if not isinstance(variable, nnx.Param):
                    continue
                name, shape = f"{path}.{leaf}", variable.shape
                if leaf == "kernel" and path in blocksizes:
                    name, (*lead, inputs, outputs) = f"{path}.weight.absmax", shape
                    blocks, rest = divmod(inputs, blocksizes[path])
                    shape = (*lead, outputs * inputs) if rest else (*lead, outputs, blocks)
                self(name, jax.ShapeDtypeStruct(shape, variable.dtype))

    def _flat(self, name: str, axes: tuple[str | None, ...]) -> NamedSharding:
        """Codes or scales in one row, of a weight whose rows are no whole number of blocks."""
        for axis in axes:
            if axis is not None and self.mesh.shape[axis] > 1:
                raise ValueError(
                    f"{name} is flat, as its in_features are no multiple of its blocksize: the "
                    f"mesh axis {axis!r} of size {self.mesh.shape[axis]} does not divide it"
                )
        return NamedSharding(self.mesh, PartitionSpec())
