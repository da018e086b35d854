"""The instructions of one thread: it loads codes of a row and decodes them, two a register."""

from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from q4jax.gpu import ptx_decode

_DYNAMIC = -(2**31)  # LLVM's mark of an index that is a value


class Thread:
    """Emits instructions.

    Attributes:
      warp, quad, eighth: its warp's number in the program, its own in its quad, and its quad's in
        the warp.

    Args:
      quant_type: "nf4" or "fp4".
      dtype: of the weights, bfloat16 or float16.
    """

    def __init__(self, quant_type: str, dtype: Any):
        self.quant_type, self.dtype = quant_type, jnp.dtype(dtype)
        self.i32 = ir.IntegerType.get_signless(32)
        thread = mgpu.utils.thread_idx()
        self.warp = self.shift_right(thread, 5)
        self.quad = arith.andi(thread, self.constant(3))
        self.eighth = arith.andi(self.shift_right(thread, 2), self.constant(7))

    def scale(self, scales: Any, offset: Any) -> Any:
        """Load a scale at an offset in bytes."""
        return self._load(scales, offset, ir.F32Type.get(), 4)

    def words(self, words: Any, offset: Any, count: int) -> list[Any]:
        """Load 2 or 4 words of codes at an offset in bytes."""
        loaded = self._load(words, offset, ir.VectorType.get((count,), self.i32), 4 * count)
        return [llvm.extractelement(loaded, self.constant(i)) for i in range(count)]

    def pairs(self, words: list[Any], scale: Any) -> list[Any]:
        """Decode codes of one block: registers of two neighbours, in their order."""
        static = {"quant_type": self.quant_type, "dtype": self.dtype, "part": 0}
        table = [
            self.asm(ptx_decode.table_word_asm(**static, word=word), "f", scale)
            for word in range(ptx_decode.TABLE_WORDS)
        ]
        texts = [ptx_decode.pair_asm(byte, spare_alu=True) for byte in range(4)]
        return [self.asm(text, "r" * 9, word, *table) for word in words for text in texts]

    def asm(self, text: str, letters: str, *args: Any) -> Any:
        """Run PTX; `letters` are the constraints of its operands."""
        constraints = ",".join(["=r", *letters])
        return llvm.inline_asm(
            self.i32, list(args), text, constraints, asm_dialect=0, has_side_effects=False
        )

    def array(self, registers: Any) -> Any:
        """Registers of two weights each, as `wgmma` has them, as one of Mosaic GPU's arrays."""
        kind = ir.BF16Type.get() if self.dtype == jnp.bfloat16 else ir.F16Type.get()
        pair = ir.VectorType.get((2,), kind)
        for at, register in enumerate(registers.flat):
            registers.flat[at] = llvm.bitcast(pair, register)
        return mgpu.FragmentedArray(
            _registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None
        )

    def _load(self, reference: Any, offset: Any, kind: Any, alignment: int) -> Any:
        base, byte = mgpu.utils.memref_ptr(reference), ir.IntegerType.get_signless(8)
        none = llvm.GEPNoWrapFlags.none
        at = llvm.getelementptr(base.type, base, [offset], [_DYNAMIC], byte, none)
        return llvm.load(kind, at, alignment=alignment)

    def constant(self, value: int) -> Any:
        """An integer."""
        return mgpu.utils.c(value, self.i32)

    def shift_right(self, value: Any, by: int) -> Any:
        """Divide by a power of two."""
        return arith.shrui(value, self.constant(by))

    def sum(self, *terms: tuple[Any, int]) -> Any:
        """The sum of values times factors."""
        total = self.constant(0)
        for value, factor in terms:
            total = arith.addi(total, arith.muli(value, self.constant(factor)))
        return total
