"""Which calls the compile tests compile: every kernel at shapes of layers, and at odd ones."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Cell:
    """One call; with `layers`, of one weight in a stack of so many."""

    operation: str
    m: int = 1
    n: int = 4096
    k: int = 4096
    dtype: str = "bfloat16"
    quant_type: str = "nf4"
    blocksize: int = 64
    nested: bool = False
    layers: int = 0

    @property
    def name(self) -> str:
        """All of it, without spaces."""
        nested = "nested" if self.nested else "plain"
        size = f"{self.m}x{self.n}x{self.k}"
        layers = f"-in-{self.layers}" * bool(self.layers)
        kind = f"{self.quant_type}-b{self.blocksize}-{nested}-{self.dtype}"
        return f"{self.operation}-{kind}-{size}{layers}"


CELLS = [
    *(Cell("linear", m) for m in (1, 16, 32, 64, 512)),
    Cell("linear", 1, 14336, 4096),
    Cell("linear", 4, 4096, 14336),
    *(Cell("linear", blocksize=b) for b in (32, 256, 4096)),
    Cell("linear", quant_type="fp4"),
    Cell("linear", nested=True),
    Cell("linear", 64, nested=True),
    Cell("linear", nested=True, layers=32),
    Cell("linear", dtype="float16"),
    Cell("linear", dtype="float32"),
    Cell("linear", 64, dtype="float32"),
    Cell("linear", 5, 1000, 4160),
    Cell("linear", 5, 1000, 4128, blocksize=32, nested=True, quant_type="fp4", dtype="float16"),
    *(Cell("linear_transpose", m) for m in (1, 32, 512)),
    Cell("linear_transpose", nested=True),
    Cell("linear_transpose", nested=True, layers=32),
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

# Weights whose codes are more than 2^31 or 2^32 bytes, and activations of more than 2^31 elements.
HUGE = [
    Cell("quantize", n=70000, k=65536),
    Cell("quantize", n=140000, k=65536, quant_type="fp4", dtype="float16", blocksize=4096),
    Cell("quantize", n=70000, k=65536, dtype="float32", blocksize=32),
    Cell("quantize", n=2**20, k=2**17 - 64),
    Cell("dequantize", n=70000, k=65536, nested=True),
    Cell("dequantize", n=140000, k=65536, dtype="float32", blocksize=32),
    Cell("dequantize", n=2**20, k=2**17 - 64, nested=True),
    Cell("linear", n=600_000, k=8192, nested=True),
    Cell("linear", 3, n=1_100_000, k=8192, dtype="float32"),
    Cell("linear", 280_000, n=8200, k=8192),
    Cell("linear_transpose", n=70_000, k=65536, nested=True),
    Cell("linear_transpose", 3, n=140_000, k=65536, blocksize=32),
    Cell("linear_transpose", 280_000, n=8192, k=8256),
    Cell("linear", n=28672, k=8192, nested=True, layers=80),
    Cell("linear_transpose", n=8200, k=28672, dtype="float32", layers=30),
]
