from hypothesis import given
from hypothesis import strategies as st

from opdctl.artifacts.records import cumulative_offsets, sample_id, sample_seed

SEED = 939531662881426345  # the first 63 bits of BLAKE2b-64 of "0/sort12-abc/00003/0"


def test_ids_and_seeds_never_change():
    """Other values would change the responses of every run."""
    assert sample_id("sort12-abc", 3, 0) == "sort12-abc/00003/0"
    assert sample_seed(0, "sort12-abc/00003/0") == SEED


@given(st.integers(0, 2**31), st.text(max_size=30))
def test_seeds_fit_every_engine(run_seed, name):
    assert 0 <= sample_seed(run_seed, name) < 2**63


def test_offsets_by_hand():
    assert cumulative_offsets([2, 0, 3]).tolist() == [0, 2, 2, 5]
    assert cumulative_offsets([]).tolist() == [0]
