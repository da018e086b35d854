"""Which calls the compile tests compile: every kernel at shapes of layers, and at odd ones."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Cell:
    """One call."""

    operation: str
    m: int = 1
    n: int = 4096
    k: int = 4096
    dtype: str = "bfloat16"
    quant_type: str = "nf4"
    blocksize: int = 64
    nested: bool = False

    @property
    def name(self) -> str:
        """All of it, without spaces."""
        nested = "nested" if self.nested else "plain"
        size = f"{self.m}x{self.n}x{self.k}"
        return f"{self.operation}-{self.quant_type}-b{self.blocksize}-{nested}-{self.dtype}-{size}"


CELLS = [
    *(Cell("linear", m) for m in (1, 16, 32, 64, 512)),
    Cell("linear", 1, 14336, 4096),
    Cell("linear", 4, 4096, 14336),
    *(Cell("linear", blocksize=b) for b in (32, 256, 4096)),
    Cell("linear", quant_type="fp4"),
    Cell("linear", nested=True),
    Cell("linear", 64, nested=True),
    Cell("linear", dtype="float16"),
    Cell("linear", dtype="float32"),
    Cell("linear", 64, dtype="float32"),
    Cell("linear", 5, 1000, 4160),
    Cell("linear", 5, 1000, 4128, blocksize=32, nested=True, quant_type="fp4", dtype="float16"),
    *(Cell("linear_transpose", m) for m in (1, 32, 512)),
    Cell("linear_transpose", nested=True),
    Cell("linear_transpose", blocksize=32),
    Cell("linear_transpose", dtype="float32"),
    Cell("linear_transpose", 5, 1000, 4160, nested=True),
    Cell("dequantize"),
    Cell("dequantize", nested=True, blocksize=32),
    Cell("dequantize", dtype="float32", blocksize=4096),
    Cell("quantize"),
    Cell("quantize", dtype="float32", quant_type="fp4", blocksize=4096),
    Cell("quantize", dtype="float16", blocksize=32),
]
