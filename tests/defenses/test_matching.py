"""Nearest caption against brute force: ties, duplicates, exclusions, any tiling."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from defenses.base import Features
from defenses.matching import CosineMatcher, nearest, staying


def brute(images: np.ndarray, pool: np.ndarray, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    norms = np.linalg.norm(images, axis=1)[:, None] * np.linalg.norm(pool, axis=1)
    cosine = images.astype(np.float64) @ pool.T / norms
    if exclude is not None:
        cosine[exclude >= 0, exclude[exclude >= 0]] = -np.inf
    return cosine.argmax(1), 1 - cosine.max(1)


@pytest.mark.parametrize("block", [1, 7, 64, 4096])
@pytest.mark.parametrize("excluding", [False, True])
def test_nearest_is_brute_force(block, excluding):
    rng = np.random.default_rng(block)
    images, pool = rng.normal(size=(50, 16)).astype(np.float32), rng.normal(size=(73, 16)).astype(np.float32)
    exclude = np.where(rng.random(50) < 0.5, brute(images, pool)[0], -1) if excluding else None
    match = nearest(
        torch.from_numpy(images),
        torch.from_numpy(pool),
        exclude=None if exclude is None else torch.from_numpy(exclude),
        block=block,
    )
    index, distance = brute(images, pool, exclude)
    np.testing.assert_array_equal(match.index, index)
    np.testing.assert_allclose(match.distance, distance, atol=1e-6)
    assert match.index.dtype == torch.int64 and match.distance.dtype == torch.float32 and match.solved is None
    if exclude is not None:
        assert not (match.index.numpy() == exclude).any()


@given(
    arrays(np.float32, st.tuples(st.integers(1, 6), st.just(4)), elements=st.sampled_from([-1.0, 1.0])),
    arrays(np.float32, st.tuples(st.integers(1, 9), st.just(4)), elements=st.sampled_from([-1.0, 1.0])),
    st.integers(1, 5),
)
@settings(max_examples=150, deadline=None)
def test_ties_and_duplicates_go_to_the_lowest_row(images, pool, block):
    # Entries ±1 in four dimensions: norms are 2 and every sum is exact, so equal cosines are equal bits.
    match = nearest(torch.from_numpy(images), torch.from_numpy(pool), block=block)
    index, distance = brute(images, pool)
    np.testing.assert_array_equal(match.index, index)
    np.testing.assert_array_equal(match.distance, distance)


def test_lengths_and_precision_do_not_matter():
    images, pool = torch.eye(3), torch.eye(3)[[2, 0, 1]]
    scaled = nearest(images.half() * 3, pool.bfloat16() * 0.5)
    assert scaled.index.tolist() == [1, 2, 0]
    assert scaled.distance.tolist() == [0, 0, 0]


def test_no_images_is_no_match():
    assert nearest(torch.empty(0, 4), torch.eye(4)).index.shape == (0,)


def test_an_excluded_row_passes_to_the_next_best():
    pool = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    images = torch.tensor([[1.0, 0.0]]).expand(3, -1)
    assert nearest(images, pool, exclude=torch.tensor([0, 1, -1])).index.tolist() == [1, 0, 0]


def test_what_cannot_be_matched_is_refused():
    with pytest.raises(ValueError, match="pool_size"):
        nearest(torch.eye(2), torch.eye(2)[:1], exclude=torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="NaN"):
        nearest(torch.eye(2), torch.tensor([[1.0, 0.0], [torch.nan, 0.0]]), block=1)
    with pytest.raises(ValueError, match="empty"):
        nearest(torch.eye(2), torch.empty(0, 2))
    with pytest.raises(ValueError, match=r"\(N, d\)"):
        nearest(torch.eye(2), torch.eye(3))
    with pytest.raises(ValueError, match="exclude"):
        nearest(torch.eye(2), torch.eye(2), exclude=torch.tensor([0]))


def test_the_matcher_matches_pooled_features():
    images, pool = Features(torch.eye(4)), Features(torch.eye(4).flip(0))
    matcher = CosineMatcher()
    assert matcher.match(images, pool).index.tolist() == [3, 2, 1, 0]
    assert not matcher.tokens and matcher.name == "cosine" and not matcher.beside


@pytest.mark.parametrize("block", [7, 4096])
def test_an_own_captions_rank_is_the_share_of_the_pool_that_is_nearer(block):
    generator = torch.Generator().manual_seed(0)
    images, pool, own = (Features(torch.randn(n, 6, generator=generator)) for n in (50, 20, 50))
    cosine = torch.nn.functional.cosine_similarity(images.pooled[:, None], pool.pooled[None], dim=2)
    mine = torch.nn.functional.cosine_similarity(images.pooled, own.pooled)
    found = CosineMatcher(move=0.5, block=block).match(images, pool, own)
    torch.testing.assert_close(found.nearer, (cosine > mine[:, None]).float().mean(1))
    torch.testing.assert_close(found.own_distance, 1 - mine)
    plain = CosineMatcher(block=block).match(images, pool)  # the own caption does not change what the pool holds
    assert torch.equal(found.index, plain.index) and torch.equal(found.distance, plain.distance)
    assert plain.nearer is None and plain.own_distance is None


def test_a_caption_that_the_pool_holds_too_is_not_nearer_than_itself():
    images = Features(torch.randn(30, 6, generator=torch.Generator().manual_seed(1)))
    assert not CosineMatcher(move=0.5).match(images, images, images).nearer.any()


def test_those_move_whose_own_caption_ranks_worst():
    nearer, gap = np.array([0.0, 0.9, 0.1, 0.9, 0.5]), np.array([0.1, 0.2, 0.1, 0.3, 0.0])
    assert staying(nearer, gap, 0.2).tolist() == [True, True, True, False, True]  # of two that rank alike, who is farther behind
    assert staying(nearer, gap, 0.4).tolist() == [True, False, True, False, True]
    assert staying(nearer, gap, 0.6).tolist() == [True, False, True, False, True]  # the next is not behind the pool at all: it stays
    assert staying(nearer, gap, 0.8).tolist() == [True, False, False, False, True]
    assert staying(nearer, gap, 0.0).all()


@given(st.integers(0, 2**32 - 1), st.integers(0, 40), st.floats(0, 1), st.floats(0.1, 9))
@settings(max_examples=100, deadline=None)
def test_who_moves_does_not_depend_on_the_scale_of_the_distances(seed, count, move, scale):
    rng = np.random.default_rng(seed)
    nearer, gap = rng.integers(0, 8, count) / 8, rng.normal(size=count)
    stays = staying(nearer, gap, move)
    assert np.array_equal(stays, staying(nearer, gap * scale, move))
    assert (~stays).sum() <= round(move * count)
    if not stays.all() and (kept := stays & (gap > 0)).any():
        assert nearer[kept].max() <= nearer[~stays].min()
