"""How the fused kernel divides the head's product: a tile by device, a plan by size.

Fixed rules instead of autotuning: autotuning depends on the noise of a measurement, so two runs
could score differently. `tools/bench_head.py` compares the rules' choices with the alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass

ROW_TILE = 128
COLUMN_TILE = 256
# Columns of the hidden size that tensor cores accumulate before the sum is moved out of them. They
# truncate every addition (Fasi et al., "Numerical behavior of NVIDIA tensor cores", 2021), so the
# error grows with the length of the chain. `tools/simulate_tensor_cores.py` models it for logits
# with standard deviation 1.3 at hidden size 4,096: a log-probability is off by up to 2.3e-5 with
# one chain (an H200 measured 2.5e-5), 1.1e-5 with blocks of 2,048, 4.7e-6 with 1,024 and 2.3e-6
# with 512. Every block that ends costs time, so shorter blocks cost more.
DEPTH_BLOCK = 1024
# Programs run in waves of 132 or 148, which fill the chip. With eight or more waves, the partly
# empty last one matters little.
PROGRAMS = 1000
MOST_COLUMN_TILES = 16
# Bytes of hidden rows that programs share. Measured on an H200, which has an L2 cache of 60 MB: at
# hidden size 4,096 the kernel takes 1.39 × as long as cuBLAS's product with 8 MiB, 1.51 × with 16
# and 32, 1.42 × with 4; at 896 and 16,384 rows, 1.15 × from 2 to 14, 1.21 × with 16.
BAND_BYTES = 8 * 2**20
HOPPER = 9


@dataclass(frozen=True)
class Tile:
    """The shape of one step: `rows` × `columns` of logits, `depth` of the hidden size at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    by_tma: bool = False
    """Whether Hopper's tensor memory accelerator fetches the tiles."""


# float32 runs on the ordinary cores (exact products, no TF32); the 16-bit tiles fill tensor cores.
# The large tile was the fastest of eight measured on an H200 for all of 1,024 to 16,384 rows.
# Compiled for other devices it does not fit the registers: each thread spills 336 bytes to memory
# on 8.0, and 1,296 on 10.0.
FLOAT32_TILE = Tile(rows=64, columns=64, depth=32, warps=4, stages=2)
MEDIUM_TILE = Tile(rows=ROW_TILE, columns=128, depth=64, warps=8, stages=3)
LARGE_TILE = Tile(rows=ROW_TILE, columns=COLUMN_TILE, depth=64, warps=8, stages=4, by_tma=True)


@dataclass(frozen=True)
class Plan:
    """How rows and vocabulary are divided among programs.

    A program reduces `group` columns of one tile of rows. Programs start in bands of `band` tiles
    of rows. `depth_block` columns of the hidden size are accumulated in one chain.
    """

    group: int
    band: int
    depth_block: int = DEPTH_BLOCK


def tile_for(element_bytes: int, capability: int | None) -> Tile:
    """Return the tile for a dtype and a major compute capability, None in Triton's interpreter."""
    if element_bytes == 4:
        return FLOAT32_TILE
    return LARGE_TILE if capability in (HOPPER, None) else MEDIUM_TILE


def plan_for(rows: int, hidden_size: int, vocab: int) -> Plan:
    """Return the plan for `rows` hidden rows and a head [vocab, hidden_size].

    Few rows: with groups of 4,096 columns, 64 rows and a vocabulary of 128,256 made 32 programs for
    an H200's 132 multiprocessors and took 3.4 × as long as cuBLAS's product (4.3 × at hidden size
    896 and 151,936); 1,024 rows made two waves and took 1.43 × and 2.5 ×. Groups now shrink until
    there are about a thousand programs or one tile per group: 501 for the 64 rows, 1,008 for 1,024,
    which takes 1.12 × at hidden size 896 (64 rows have not been measured since).
    Grouping changes which float32 partial sums are merged, but no logit: a score moves by at most
    its last bit, 1e-6 above -16 nat.

    Many rows: if all tiles of rows ran side by side, the 8,192 × 4,096 hidden states of a step
    (67 MB) would be read once per tile of columns, and an L2 cache of 50 MB cannot hold them. A
    band of 8 tiles, 1,024 rows, fits; each band reads the weights again, 8 times in all. Bands are
    of one size, because a smaller last one would leave a part of the chip idle.
    """
    row_tiles, column_tiles = max(1, _pieces(rows, ROW_TILE)), _pieces(vocab, COLUMN_TILE)
    tiles = MOST_COLUMN_TILES
    while tiles > 1 and row_tiles * _pieces(column_tiles, tiles) < PROGRAMS:
        tiles //= 2
    bands = _pieces(row_tiles, max(1, BAND_BYTES // (2 * ROW_TILE * hidden_size)))
    return Plan(tiles * COLUMN_TILE, _pieces(row_tiles, bands))


def _pieces(whole: int, size: int) -> int:
    return -(-whole // size)
