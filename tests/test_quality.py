"The measures against the libraries and against sets whose answer is known."

import pytest
import torch
from torchmetrics.image import FrechetInceptionDistance

import cpsample.practice.encoders
from cpsample.core.digit_features import frechet_distance
from cpsample.core.images import load_digits, pixels
from cpsample.practice.datasets import load_fashion
from cpsample.practice.encoders import features, inception_features
from cpsample.practice.quality_measures import _Features, kid, mifid, precision_recall, quality
from cpsample.workshop.files import import_optional

G = torch.Generator().manual_seed(0)
A, B = torch.randn(700, 16, generator=G), torch.randn(500, 16, generator=G) * 1.3 + 0.4


def test_frechet_distance_is_that_of_torchmetrics():
    metric = FrechetInceptionDistance(feature=_Features(16)).set_dtype(torch.float64)
    metric.update(A.double(), real=True)
    metric.update(B.double(), real=False)
    torch.testing.assert_close(frechet_distance(A, B), metric.compute().item(), rtol=1e-4, atol=0)


def test_kid_is_that_of_torch_fidelity():
    from torch_fidelity.metric_kid import kernel_mmd

    theirs = kernel_mmd(
        A.double()[:500].numpy(),
        B.double().numpy(),
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,
        kid_kernel_poly_coef0=1,
    )
    mine = kid(A[:500], B, subsets=1, subset_size=500)[0]
    torch.testing.assert_close(mine, float(theirs), rtol=1e-4, atol=0)


def test_kid_of_equal_laws_is_zero_within_noise_and_reproducible():
    a, b = torch.randn(2, 2000, 8, generator=G)
    mean, std = kid(a, b, subsets=50, subset_size=500)
    assert (
        abs(mean) < 3 * std
        and kid(a, b, 50, 500) == (mean, std)
        and kid(a, b, 50, 500, seed=1) != (mean, std)
    )
    state = torch.get_rng_state()
    kid(a, b, 2, 100)
    assert torch.equal(torch.get_rng_state(), state)


def test_precision_and_recall_of_known_sets():
    "Real: two far clusters. Generated: one of them (precise, recalls half); both and rubbish (recalls all, precision by share)."
    real = torch.cat([torch.randn(300, 4, generator=G), torch.randn(300, 4, generator=G) + 50])
    one, rubbish = torch.randn(600, 4, generator=G), torch.randn(300, 4, generator=G) - 500
    p, r = precision_recall(one, real)
    assert p > 0.85 and 0.4 < r <= 0.5
    p, r = precision_recall(
        torch.cat([real[torch.randperm(600, generator=G)][:600] + 0.01, rubbish]), real
    )
    assert 0.6 < p < 0.7 and r > 0.95


def test_mifid_divides_by_the_distance_to_the_training_set():
    train = torch.randn(400, 8, generator=G) + 2
    fresh, copies = (
        torch.randn(400, 8, generator=G) + 2,
        train + 1e-3 * torch.randn(400, 8, generator=G),
    )
    assert mifid(fresh, train, tau=1e-6) == pytest.approx(
        frechet_distance(fresh, train), rel=1e-4
    )  # beyond τ: undivided
    cosine = (
        torch.nn.functional.normalize(fresh, dim=1) @ torch.nn.functional.normalize(train, dim=1).T
    )
    m = (1 - cosine.abs()).min(1).values.mean().item()
    assert mifid(fresh, train, tau=1.0) == pytest.approx(
        frechet_distance(fresh, train) / m, rel=1e-4
    )
    few = mifid(copies[:200], train[:200])
    assert few > frechet_distance(copies[:200], train[:200]) * 1e3


def test_blur_noise_and_collapse_are_seen_where_they_should_be():
    x = pixels(load_fashion("test", small=True)[0])
    a, b = x[:1000], x[1000:]
    good, noisy, few = (
        quality(a, b),
        quality((a + torch.randn(a.shape, generator=G)).clamp(-1, 1), b),
        quality(a[:10].repeat(100, 1, 1, 1), b),
    )
    assert (
        noisy["fd"] > 10 * good["fd"]
        and noisy["precision"] < good["precision"] - 0.15
        and noisy["recall"] < 0.5 * good["recall"]
    )
    assert (
        few["recall"] < 0.2 < 0.6 < good["recall"]
        and few["fd"] > 3 * good["fd"]
        and few["kid"] > good["kid"]
    )


def test_a_baseline_stands_beside_every_number():
    x = pixels(load_fashion("test", small=True)[0])
    row = quality(x[:300], x[300:600], x[600:900], baseline=x[900:1200])
    assert {k: row[f"{k}_real"] for k in ("fd", "kid", "mifid")} == {
        k: v
        for k, v in quality(x[900:1200], x[300:600], x[600:900]).items()
        if k in ("fd", "kid", "mifid")
    }
    assert set(row) == {
        "fd",
        "kid",
        "precision",
        "recall",
        "mifid",
        "fd_real",
        "kid_real",
        "precision_real",
        "recall_real",
        "mifid_real",
    }
    assert 0.3 < row["fd"] / row["fd_real"] < 3


def test_spaces():
    digits, fashion = load_digits()[0][:7], pixels(load_fashion(small=True)[0][:7])
    assert features(digits, "digits-mlp-64").shape == features(fashion).shape == (7, 64)
    torch.testing.assert_close(features(fashion, chunk=2), features(fashion), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="choose one of digits-mlp-64"):
        features(fashion, "vgg")
    fashion[3, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="row 3"):
        features(fashion)


def test_missing_extras_and_weights_say_what_to_do(monkeypatch):
    with pytest.raises(
        ImportError, match=r"no_such_module is not installed: pip install 'cpsample\[metrics\]'"
    ):
        import_optional("no_such_module.part", "metrics")

    class Extractor:
        def __init__(self, *args):
            raise OSError("no route to host")

    cpsample.practice.encoders.inception.cache_clear()
    monkeypatch.setattr(
        import_optional("torch_fidelity.feature_extractor_inceptionv3", "metrics"),
        "FeatureExtractorInceptionV3",
        Extractor,
    )
    with pytest.raises(OSError, match="connect to the network, or use another feature space"):
        inception_features(torch.zeros(2, 1, 28, 28))


def test_inception_gets_bytes_in_three_channels(monkeypatch):
    seen = []

    class Extractor(torch.nn.Module):
        def __init__(self, *args):
            super().__init__()

        def forward(self, x):
            seen.append(x)
            return (x.float().mean((1, 2, 3))[:, None],)

    cpsample.practice.encoders.inception.cache_clear()
    monkeypatch.setattr(
        import_optional("torch_fidelity.feature_extractor_inceptionv3", "metrics"),
        "FeatureExtractorInceptionV3",
        Extractor,
    )
    cpsample.practice.encoders.features(
        torch.linspace(-1.2, 1.2, 5).view(5, 1, 1, 1).expand(5, 1, 4, 4), "inception-2048"
    )
    assert (
        seen[0].dtype == torch.uint8
        and seen[0].shape == (5, 3, 4, 4)
        and seen[0][:, 0, 0, 0].tolist() == [0, 51, 128, 204, 255]
    )
