"""The instructions, a file for each family."""

from tests.support.ptx.instructions import (  # noqa: F401  (they fill the table)
    arithmetic,
    control,
    conversion,
    copies,
    loads,
    logic,
    mma,
    moves,
    tensor_copies,
    warp,
    wgmma,
)
from tests.support.ptx.instructions.table import TABLE, find

__all__ = ["TABLE", "find"]
