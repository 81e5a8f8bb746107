"Neighbours and near-duplicates: what the fast search finds is what the slow one finds."

import io
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cpsample.core.copying import ratio_score
from cpsample.core.images import first_occurrence, pixels, to_bytes
from cpsample.judgement.repeats import duplicate_groups, near_pairs, principal_axes, project
from cpsample.practice.datasets import load_fashion
from cpsample.workshop.files import fingerprint
from cpsample.workshop.neighbours import distance, nearest, nearest_groups, typical_distance

TRAIN, REAL = (pixels(load_fashion(part, small=True)[0]) for part in ("train", "test"))


def seed(n):
    return torch.Generator().manual_seed(n)


def jpeg(x, quality):
    "Grey pictures, saved as JPEG and read again."
    again = []
    for picture in to_bytes(x)[:, 0]:
        file = io.BytesIO()
        Image.fromarray(picture.numpy()).save(file, "jpeg", quality=quality)
        again.append(torch.from_numpy(np.array(Image.open(file))))
    return pixels(torch.stack(again)[:, None])


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
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(2, 90), st.integers(1, 5))
def test_of_a_group_only_the_nearest_member_is_a_neighbour(k, k_groups, n, neighbours):
    "All distances are exact, however many members a group has."
    g = seed(k)
    refs, x = torch.randn(n, 1, 2, 3, generator=g), torch.randn(9, 1, 2, 3, generator=g)
    labels = (k_groups * torch.rand(n, generator=g) ** 3).long()
    refs[labels == 0] *= 0.1  # one group is large, and all of it nearer than the others
    groups = torch.stack([(labels == label).nonzero()[0, 0] for label in labels])
    d, rows = nearest_groups(x, refs, groups, k=neighbours)

    # Slowly: of each group the nearest member.
    every = all_distances(x, refs)
    of_groups = torch.stack([every[:, groups == first].amin(1) for first in groups.unique()], 1)
    expected = of_groups.sort(1).values[:, :neighbours]
    torch.testing.assert_close(d, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(every.gather(1, rows), d, atol=1e-4, rtol=1e-4)
    assert all(len(row.unique()) == len(row) for row in groups[rows])


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


def test_groups_have_a_centre_and_hold_exact_repeats():
    "1 is the centre of 0, 1 and 2; 5 is there twice; 9 is alone."
    x = torch.zeros(7, 1, 2, 2)
    x[:, 0, 0, 0] = torch.tensor([0.0, 5, 1, 2, 5, 9, 0])
    x[:, 0, 0, 1] = x[:, 0, 0, 0]
    assert duplicate_groups(x, 1.5).tolist() == [0, 1, 0, 0, 1, 5, 0]
    assert duplicate_groups(x, 0.1).tolist() == [0, 1, 2, 3, 1, 5, 0]


def test_ten_thousand_repeats_are_one_image():
    x = TRAIN[:3].repeat(3000, 1, 1, 1)
    assert duplicate_groups(x, 0.1).unique().tolist() == [0, 1, 2]


def square(grey):
    "Flat pictures of these greys."
    return grey.view(-1, 1, 1, 1).expand(-1, 3, 8, 8)


@pytest.mark.parametrize(
    "film, least",
    [
        (square(torch.linspace(-1, 1, 40)), 40 // 3),
        (TRAIN[:1].lerp(TRAIN[1:2], torch.linspace(0, 1, 100).view(-1, 1, 1, 1)), 100 // 5),
        (torch.linspace(0, 1, 60).view(-1, 1, 1, 1) * TRAIN[:1], 60 // 5),
    ],
)
def test_a_slow_fade_is_no_single_picture(film, least):
    radius = typical_distance(film) / 3
    groups = duplicate_groups(film, radius)
    assert len(groups.unique()) >= least
    first_and_last = distance(film[:1], film[-1:], flips=True)
    assert first_and_last > 5 * radius and groups[0] != groups[-1]


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.integers(0, 10**6), st.integers(2, 60), st.floats(0.1, 3), st.booleans())
def test_groups_are_no_wider_than_two_radii_in_whatever_order(k, n, radius, flips):
    # A random walk: chains of all lengths, and some exact repeats.
    g = seed(k)
    x = (0.3 * torch.randn(n, 1, 2, 3, generator=g)).cumsum(0)
    x[n // 2] = x[0]
    groups = duplicate_groups(x, radius, flips)
    every = all_distances(x, x, flips)
    same = groups[:, None] == groups
    assert every[same].max() <= 2 * radius + 1e-4
    for first in groups.unique():
        members = (groups == first).nonzero()[:, 0]
        assert members.min() == first
        assert every[members][:, members].amax(1).min() <= radius + 1e-4

    # Slowly: who has most neighbours takes all that are free, whoever asks first.
    if (every - radius).abs().min() > 1e-4:  # no tie that rounding decides
        distinct = first_occurrence(x).unique()
        near = every[distinct][:, distinct] <= radius
        rank = [(-int(near[i].sum()), fingerprint(x[row])) for i, row in enumerate(distinct)]
        free, slow = torch.ones(len(distinct), dtype=torch.bool), torch.zeros(n, dtype=torch.long)
        for i in sorted(range(len(distinct)), key=rank.__getitem__):
            if free[i]:
                members = distinct[near[i] & free]
                slow[members] = members.min()
                free &= ~near[i]
        assert torch.equal(groups, slow[first_occurrence(x)])
    order = torch.randperm(n, generator=g)
    again = duplicate_groups(x[order], radius, flips)
    assert torch.equal(again[:, None] == again, same[order][:, order])


@settings(deadline=None, max_examples=12, derandomize=True)
@given(st.integers(0, 10**6), st.integers(2, 40), st.floats(0.001, 0.1), st.booleans())
def test_every_repeat_counts_however_many_there_are(k, times, strength, mirrored):
    "Twelve or forty repeats of each picture fill the first places; the scale lies beyond them."
    g = seed(k)
    coarse = torch.rand(30, 1, 7, 7, generator=g) * 2 - 1
    pictures = torch.nn.functional.interpolate(coarse, (28, 28), mode="bilinear")
    x = pictures.repeat(times, 1, 1, 1)
    x = x + strength * torch.randn(x.shape, generator=g)
    if mirrored:
        x[1::2] = x[1::2].flip(-1)
    order = torch.randperm(len(x), generator=g)
    groups = duplicate_groups(x[order], typical_distance(x[order]) / 3)
    assert len(groups.unique()) == 30
    same = (order % 30)[:, None] == order % 30
    assert torch.equal(groups[:, None] == groups, same)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    st.integers(0, 10**6), st.integers(1, 40), st.integers(0, 50), st.sampled_from([1, 3, 7, 50])
)
def test_planted_shares_are_read_whatever_repeats_there_are(k, times, copies, groups_of):
    "Of fifty images so many copy; one of so many training pictures is there again and again."
    g = seed(k)
    coarse = torch.rand(90, 1, 7, 7, generator=g) * 2 - 1
    pictures = torch.nn.functional.interpolate(coarse, (28, 28), mode="bilinear")
    own, strangers = pictures[:40], pictures[40:]
    training = torch.cat([own, own[::groups_of].repeat(times, 1, 1, 1)])
    training = training + 0.03 * torch.randn(training.shape, generator=g)
    training = training[torch.randperm(len(training), generator=g)]

    rows = torch.randint(40, (copies,), generator=g)
    x = torch.cat([own[rows], strangers[: 50 - copies]])
    x = x + 0.03 * torch.randn(x.shape, generator=g)
    groups = duplicate_groups(training, typical_distance(training) / 3)
    assert len(groups.unique()) == 40
    d, _ = nearest_groups(x, training, groups, k=2, flips=True)
    is_copy = ratio_score(d) < 1 / 3
    assert is_copy.tolist() == [True] * copies + [False] * (50 - copies)


def test_pictures_saved_twelve_times_are_one():
    "Of quality 96 … 52: the tenth neighbour of every picture is itself, saved again."
    pictures = TRAIN[:25]
    saved = torch.cat([jpeg(pictures, quality) for quality in range(96, 51, -4)])
    groups = duplicate_groups(saved, typical_distance(saved) / 3)
    assert len(saved) - len(groups.unique()) == 275
    assert torch.equal(groups, torch.arange(25).repeat(12))


def test_different_pictures_have_no_gap():
    "Their scale is the plain median to the tenth, to the bit."
    for x in (TRAIN, REAL[:60], TRAIN[:300]):
        order = torch.randperm(len(x), generator=seed(0))[:100]
        plain = nearest(x[order], x, 11, flips=True)[0][:, 10].median().item()
        assert typical_distance(x) == plain


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_distances_are_taken_in_full_precision(kind, backend):
    "In half precision the square of a distance of 1,773 overflows, and bytes wrap round."
    if backend == "faiss":
        pytest.importorskip("faiss")
    white, black = torch.ones(1, 3, 512, 512), torch.zeros(1, 3, 512, 512)
    scale = 255 if kind == torch.uint8 else 2
    refs = torch.cat([black, scale * white]).to(kind)
    d, rows = nearest(refs, refs, 2, backend=backend)
    assert d.dtype == (torch.float64 if kind == torch.float64 else torch.float32)
    assert torch.equal(rows[:, 0], torch.arange(2)) and d[:, 0].max() == 0
    assert d[:, 1].tolist() == pytest.approx(2 * [scale * 786432**0.5], rel=1e-4)
    assert distance(refs[:1], refs[1:]).item() == pytest.approx(scale * 786432**0.5, rel=1e-4)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("side", [0, 1])
def test_a_distance_that_is_not_finite_is_an_error(broken, side):
    sets = [REAL[:3].clone(), TRAIN[:9].clone()]
    sets[side][1] = broken
    with pytest.raises(ValueError, match="not finite"):
        nearest(*sets)
