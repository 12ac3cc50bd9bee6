"""How twins walk over pictures: one program a tile of one picture."""

from __future__ import annotations

from fusionkit.kernels._dispatch import twin

BLOCK = {"BLOCK_HEIGHT": 8, "BLOCK_WIDTH": 64}
tl = None  # triton.language, once a twin has run


def tiles(pictures: int, height: int, width: int) -> int:
    """How many programs it takes."""
    return pictures * -(-height // BLOCK["BLOCK_HEIGHT"]) * -(-width // BLOCK["BLOCK_WIDTH"])


@twin
def place(height, width, BLOCK_HEIGHT: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """This program's picture, the rows (n, 1) and columns (1, n) of its tile, and which exist."""
    tiles_down, tiles_across = tl.cdiv(height, BLOCK_HEIGHT), tl.cdiv(width, BLOCK_WIDTH)
    program = tl.program_id(0)
    tile = program % (tiles_down * tiles_across)
    y = (tile // tiles_across) * BLOCK_HEIGHT + tl.arange(0, BLOCK_HEIGHT)[:, None]
    x = (tile % tiles_across) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)[None, :]
    picture = (program // (tiles_down * tiles_across)).to(tl.int64)
    return picture, y, x, (y < height) & (x < width)
