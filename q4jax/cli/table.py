"""A table of tensors."""

from typing import NamedTuple

from q4jax.interop.progress import size


class Row(NamedTuple):
    """One tensor, or one 4-bit weight with its statistics."""

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int


def table(rows: list[Row]) -> str:
    """The rows in columns, and their sum.

    >>> print(table([Row("up.weight", "nf4_b64_n0_float32_2x64", (2, 64), 72)]))
    name       kind                     shape  bytes
    up.weight  nf4_b64_n0_float32_2x64  2x64    72 B
    1 tensor                                    72 B
    """
    count = f"{len(rows)} tensor{'s' if len(rows) != 1 else ''}"
    total = sum(row.nbytes for row in rows)
    lines = [("name", "kind", "shape", "bytes")]
    for row in rows:
        # A name may come from anywhere: no control characters on a terminal.
        name = row.name if row.name.isprintable() else repr(row.name)
        lines.append((name, row.kind, "x".join(map(str, row.shape)) or "-", size(row.nbytes)))
    lines.append((count, "", "", size(total)))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {shape:<{widths[2]}}  {size:>{widths[3]}}"
        for name, kind, shape, size in lines
    )
