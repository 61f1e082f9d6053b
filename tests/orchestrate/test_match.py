"""How a matching round is cut into items of work."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrate.match import CAPTIONS, IMAGES, SHARES, work_items


@given(
    pool=st.integers(0, 50_000),
    images=st.integers(1, 3_000_000),
    batch=st.integers(1, 4096),
    actors=st.integers(1, 256),
)
def test_the_items_of_a_round_are_all_captions_then_all_images_once(pool: int, images: int, batch: int, actors: int) -> None:
    items = work_items([3], {3: pool}, images, max(batch, images // 5000), actors)
    assert [item["kind"] for item in items] == sorted(item["kind"] for item in items) and CAPTIONS < IMAGES
    for kind, total in ((CAPTIONS, pool), (IMAGES, images)):
        edges = [(item["start"], item["stop"]) for item in items if item["kind"] == kind]
        assert [start for start, _ in edges] == [0, *(stop for _, stop in edges[:-1])][: len(edges)]
        assert sum(stop - start for start, stop in edges) == total


@given(images=st.integers(1, 100_000_000), batch=st.integers(64, 4096), actors=st.integers(1, 64))
def test_a_larger_set_has_larger_items_of_whole_batches_and_not_more_of_them(images: int, batch: int, actors: int) -> None:
    found = [item for item in work_items([1], {1: 0}, images, batch, actors) if item["kind"] == IMAGES]
    assert len(found) <= SHARES * actors
    assert all(item["start"] % batch == 0 for item in found)
    if images <= batch * SHARES * actors:
        assert max(item["stop"] - item["start"] for item in found) <= batch
