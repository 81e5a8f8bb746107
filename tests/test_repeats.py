"Neighbours and near-duplicates: what the fast search finds is what the slow one finds."

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpsample.core.images import pixels
from cpsample.judgement.repeats import duplicate_groups, near_pairs, principal_axes, project
from cpsample.practice.datasets import load_fashion
from cpsample.workshop.neighbours import nearest, nearest_groups, typical_distance

TRAIN, REAL = (pixels(load_fashion(part, small=True)[0]) for part in ("train", "test"))


def seed(n):
    return torch.Generator().manual_seed(n)


def all_distances(x, refs, flips=False):
    "Every row of x with every row of refs, mirrored too with flips: [B, N]."
    d = (x[:, None] - refs[None]).flatten(2).norm(dim=2)
    if flips:
        d = torch.minimum(d, (x[:, None] - refs.flip(-1)[None]).flatten(2).norm(dim=2))
    return d


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 60), st.integers(1, 9), st.booleans()
)
def test_nearest_is_brute_force(k, n, m, neighbours, flips):
    x = torch.randn(n, 1, 3, 4, generator=seed(k))
    refs = torch.randn(m, 1, 3, 4, generator=seed(k + 1))
    every = all_distances(x, refs, flips)
    d, rows = nearest(x, refs, neighbours, chunk=7, flips=flips)
    torch.testing.assert_close(d, every.sort(1).values[:, :neighbours], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(every.gather(1, rows), d, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("flips", [False, True])
def test_faiss_finds_the_same(flips):
    pytest.importorskip("faiss")
    d, rows = nearest(REAL[:50], TRAIN[:300], 5, flips=flips)
    d_faiss, rows_faiss = nearest(REAL[:50], TRAIN[:300], 5, flips=flips, backend="faiss")
    torch.testing.assert_close(d, d_faiss, atol=1e-3, rtol=1e-4)
    assert (rows == rows_faiss).float().mean() > 0.99


def test_backends_are_checked_before_anything_is_computed(monkeypatch):
    with pytest.raises(ValueError, match="unknown backend 'annoy'"):
        nearest(REAL[:2], TRAIN[:9], backend="annoy")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"cpsample\[audit\]"):
        nearest(REAL[:2], TRAIN[:9], backend="faiss")


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 30))
def test_of_a_group_only_the_nearest_member_is_a_neighbour(k, k_groups, n):
    """The nearest distance is exact; so are all of them when only the nearest group has more than
    one member nearby."""
    g = seed(k)
    refs, x = torch.randn(n, 1, 2, 3, generator=g), torch.randn(9, 1, 2, 3, generator=g)
    labels = torch.randint(k_groups, (n,), generator=g)
    groups = torch.stack([(labels == label).nonzero()[0, 0] for label in labels])
    every = all_distances(x, refs)
    d, rows = nearest_groups(x, refs, groups, k=2)
    torch.testing.assert_close(d[:, 0], every.min(1).values, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(every.gather(1, rows), d, atol=1e-4, rtol=1e-4)
    if d.shape[1] > 1:
        assert (groups[rows[:, 0]] != groups[rows[:, 1]]).all()


def test_typical_distance_is_the_median_to_the_kth_other():
    x = torch.tensor([0.0, 1, 3, 7, 20]).view(5, 1, 1, 1)
    assert typical_distance(x, k=1) == 2.0  # 1, 1, 2, 4, 13
    assert typical_distance(x, k=2) == 3.0  # 3, 2, 3, 6, 17


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 80), st.floats(0.01, 4), st.booleans())
def test_near_pairs_are_brute_force(k, n, radius, flips):
    # The second half repeats the first with a little noise, every other one mirrored.
    g = seed(k)
    x, rest = torch.randn(n, 1, 3, 4, generator=g), n - n // 2
    strength = 0.3 * torch.rand(rest, 1, 1, 1, generator=g)
    x[n // 2 :] = x[:rest] + strength * torch.randn(rest, 1, 3, 4, generator=g)
    x[n // 2 :: 2] = x[n // 2 :: 2].flip(-1)

    every = all_distances(x, x, flips)
    if (every - radius).abs().min() < 1e-4:
        return  # a tie that rounding decides
    expected = (every <= radius).triu(1).nonzero()
    assert torch.equal(near_pairs(x, radius, flips, chunk=16), expected)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 12))
def test_shadows_are_no_farther_apart(k, n, dims):
    x = torch.randn(n, 1, 3, 4, generator=seed(k))
    centre, axes = principal_axes(x, dims, rows=20)
    gram = axes.T @ axes
    torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-5, rtol=0)
    z, mirrored = project(x, centre, axes), project(x, centre, axes, mirrored=True)
    torch.testing.assert_close(mirrored, project(x.flip(-1), centre, axes))
    assert (all_distances(z[:, None], z[:, None]) <= all_distances(x, x) + 1e-5).all()


def test_groups_follow_chains_and_exact_repeats():
    "0, 1 and 2 are a chain, 5 is there twice, 9 is alone."
    x = torch.zeros(7, 1, 2, 2)
    x[:, 0, 0, 0] = torch.tensor([0.0, 5, 1, 2, 5, 9, 0])
    x[:, 0, 0, 1] = x[:, 0, 0, 0]
    assert duplicate_groups(x, 1.5).tolist() == [0, 1, 0, 0, 1, 5, 0]
    assert duplicate_groups(x, 0.1).tolist() == [0, 1, 2, 3, 1, 5, 0]


def test_ten_thousand_repeats_are_one_image():
    x = TRAIN[:3].repeat(3000, 1, 1, 1)
    assert duplicate_groups(x, 0.1).unique().tolist() == [0, 1, 2]
