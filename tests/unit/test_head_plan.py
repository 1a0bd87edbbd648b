"""The rules that divide the head's product among a GPU's programs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantgate.patches.scoremode import head_plan

# An H200's, and those of a B200.
MULTIPROCESSORS = (132, 148)
VOCABULARIES = {4096: 128256, 896: 151936}


def programs(rows: int, hidden_size: int, vocab: int) -> int:
    plan = head_plan.plan_for(rows, hidden_size, vocab)
    return -(-rows // head_plan.ROW_TILE) * -(-vocab // plan.group)


@given(rows=st.integers(0, 2**16), hidden_size=st.integers(1, 2**15), vocab=st.integers(1, 300_000))
def test_a_plan_covers_every_shape(rows: int, hidden_size: int, vocab: int) -> None:
    plan = head_plan.plan_for(rows, hidden_size, vocab)
    assert plan.group % head_plan.COLUMN_TILE == 0
    assert head_plan.COLUMN_TILE <= plan.group <= 4096
    assert plan.band >= 1
    assert programs(rows, hidden_size, vocab) < 2**31  # of a grid's first axis


@given(rows=st.integers(1, 2**16), more=st.integers(0, 2**16), vocab=st.integers(1, 300_000))
def test_more_rows_never_make_smaller_groups(rows: int, more: int, vocab: int) -> None:
    few, many = (head_plan.plan_for(n, 4096, vocab) for n in (rows, rows + more))
    assert few.group <= many.group


@pytest.mark.parametrize("hidden_size", VOCABULARIES)
@pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS)
@pytest.mark.parametrize("rows", [1, 64, 200, 1024, 3000, 8192, 16384])
def test_the_chip_is_busy(rows: int, multiprocessors: int, hidden_size: int) -> None:
    """Counted in tiles that one multiprocessor computes: at most a seventh more than all share."""
    vocab = VOCABULARIES[hidden_size]
    plan = head_plan.plan_for(rows, hidden_size, vocab)
    row_tiles, column_tiles = -(-rows // head_plan.ROW_TILE), -(-vocab // head_plan.COLUMN_TILE)
    waves = -(-programs(rows, hidden_size, vocab) // multiprocessors)
    taken = waves * plan.group // head_plan.COLUMN_TILE
    assert taken <= max(1.15 * row_tiles * column_tiles / multiprocessors, 5)


def test_many_rows_go_in_bands_that_fit_the_cache() -> None:
    assert head_plan.plan_for(8192, 4096, 128256) == head_plan.Plan(group=4096, band=8)
    assert head_plan.plan_for(1024, 4096, 128256) == head_plan.Plan(group=1024, band=8)
    assert head_plan.plan_for(64, 4096, 128256) == head_plan.Plan(group=256, band=1)
    # 36 tiles of 896 would fit: halves of 64 tiles, not 36 and 28, and quarters of 128.
    assert head_plan.plan_for(8192, 896, 151936).band == 32
    assert head_plan.plan_for(16384, 896, 151936).band == 32


def test_tiles_divide_what_they_are_steps_of() -> None:
    for tile in (head_plan.LARGE_TILE, head_plan.MEDIUM_TILE, head_plan.FLOAT32_TILE):
        assert head_plan.COLUMN_TILE % tile.columns == 0
        assert head_plan.DEPTH_BLOCK % tile.depth == 0


def test_a_device_gets_the_tile_that_it_was_compiled_with() -> None:
    assert head_plan.tile_for(2, 9) is head_plan.LARGE_TILE
    assert head_plan.tile_for(2, 8) is head_plan.MEDIUM_TILE
    assert head_plan.tile_for(2, 10) is head_plan.MEDIUM_TILE
    assert head_plan.tile_for(4, 9) is head_plan.FLOAT32_TILE
