"""The table of tensors that `inspect` prints."""

from typing import NamedTuple

from q4jax.interop.progress import size


class Row(NamedTuple):
    """One dense tensor, or one 4-bit weight including its statistics."""

    name: str
    dtype: str  # name of the dtype, or the spec of a 4-bit weight
    shape: tuple[int, ...]
    nbytes: int


def table(rows: list[Row]) -> str:
    """Format rows as text columns, with a line of totals.

    >>> print(table([Row("up.weight", "nf4_b64_n0_float32_2x64", (2, 64), 72)]))
    name       dtype                    shape  bytes
    up.weight  nf4_b64_n0_float32_2x64  2x64    72 B
    1 tensor                                    72 B
    """
    count = f"{len(rows)} tensor{'s' if len(rows) != 1 else ''}"
    total = sum(row.nbytes for row in rows)
    lines = [("name", "dtype", "shape", "bytes")]
    for row in rows:
        # Names are untrusted: control characters must not reach the terminal.
        name = row.name if row.name.isprintable() else repr(row.name)
        lines.append((name, row.dtype, "x".join(map(str, row.shape)) or "-", size(row.nbytes)))
    lines.append((count, "", "", size(total)))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        f"{name:<{widths[0]}}  {dtype:<{widths[1]}}  {shape:<{widths[2]}}  {size:>{widths[3]}}"
        for name, dtype, shape, size in lines
    )
