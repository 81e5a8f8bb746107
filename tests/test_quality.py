"The measures against the libraries and against sets whose answer is known."

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.image import FrechetInceptionDistance

from cpsample.core.digit_encoder import frechet_distance
from cpsample.core.images import load_digits, pixels
from cpsample.practice.datasets import load_fashion
from cpsample.practice.encoders import features, inception, inception_features
from cpsample.practice.quality_measures import _Features, kid, mifid, precision_recall, quality
from cpsample.workshop.files import import_optional

G = torch.Generator().manual_seed(0)
A, B = torch.randn(700, 16, generator=G), torch.randn(500, 16, generator=G) * 1.3 + 0.4


@pytest.fixture
def replace_inception(monkeypatch):
    "A function that puts another class in the place of torch-fidelity's Inception."
    library = import_optional("torch_fidelity.feature_extractor_inceptionv3", "metrics")

    def replace(extractor):
        monkeypatch.setattr(library, "FeatureExtractorInceptionV3", extractor)
        inception.cache_clear()

    yield replace
    inception.cache_clear()


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
    ours = kid(A[:500], B, subsets=1, subset_size=500)[0]
    torch.testing.assert_close(ours, float(theirs), rtol=1e-4, atol=0)


def test_kid_of_equal_laws_is_zero_within_noise_and_reproducible():
    a, b = torch.randn(2, 2000, 8, generator=G)
    options = dict(subsets=50, subset_size=500)
    mean, std = kid(a, b, **options)
    assert abs(mean) < 3 * std
    assert kid(a, b, **options) == (mean, std)
    assert kid(a, b, **options, seed=1) != (mean, std)
    state = torch.get_rng_state()
    kid(a, b, subsets=2, subset_size=100)
    assert torch.equal(torch.get_rng_state(), state)


def test_precision_and_recall_of_known_sets():
    """Real: two far clusters. Generated: one of them, or both and rubbish.

    The first is precise and recalls half, the second recalls all and is precise by its share.
    """
    real = torch.cat([torch.randn(300, 4, generator=G), torch.randn(300, 4, generator=G) + 50])
    one, rubbish = torch.randn(600, 4, generator=G), torch.randn(300, 4, generator=G) - 500
    precision, recall = precision_recall(one, real)
    assert precision > 0.85 and 0.4 < recall <= 0.5

    near_copies = real[torch.randperm(600, generator=G)] + 0.01
    precision, recall = precision_recall(torch.cat([near_copies, rubbish]), real)
    assert 0.6 < precision < 0.7 and recall > 0.95


def test_mifid_divides_by_the_distance_to_the_training_set():
    train = torch.randn(400, 8, generator=G) + 2
    fresh = torch.randn(400, 8, generator=G) + 2
    copies = train + 1e-3 * torch.randn(400, 8, generator=G)
    fd = frechet_distance(fresh, train)
    assert mifid(fresh, train, tau=1e-6) == pytest.approx(fd, rel=1e-4)  # beyond τ: undivided

    cosine = F.normalize(fresh, dim=1) @ F.normalize(train, dim=1).T
    m = (1 - cosine.abs()).min(1).values.mean().item()
    assert mifid(fresh, train, tau=1.0) == pytest.approx(fd / m, rel=1e-4)

    fd_of_copies = frechet_distance(copies[:200], train[:200])
    assert mifid(copies[:200], train[:200]) > fd_of_copies * 1e3


def test_blur_noise_and_collapse_are_seen_where_they_should_be():
    x = pixels(load_fashion("test", small=True)[0])
    a, b = x[:1000], x[1000:]
    noise = torch.randn(a.shape, generator=G)
    good = quality(a, b)
    noisy = quality((a + noise).clamp(-1, 1), b)
    few = quality(a[:10].repeat(100, 1, 1, 1), b)

    assert noisy["fd"] > 10 * good["fd"]
    assert noisy["precision"] < good["precision"] - 0.15
    assert noisy["recall"] < 0.5 * good["recall"]
    assert few["recall"] < 0.2 < 0.6 < good["recall"]
    assert few["fd"] > 3 * good["fd"] and few["kid"] > good["kid"]


def test_a_baseline_stands_beside_every_number():
    x = pixels(load_fashion("test", small=True)[0])
    samples, reference, training, baseline = x[:1200].split(300)
    row = quality(samples, reference, training, baseline=baseline)
    of_samples = quality(samples, reference, training)
    of_baseline = quality(baseline, reference, training)
    assert row == of_samples | {f"{name}_real": value for name, value in of_baseline.items()}
    assert list(of_samples) == ["fd", "kid", "precision", "recall", "mifid"]
    assert 0.3 < row["fd"] / row["fd_real"] < 3


def test_spaces():
    digits, fashion = load_digits()[0][:7], pixels(load_fashion(small=True)[0][:7])
    assert features(digits, "digits-mlp-64").shape == features(fashion).shape == (7, 64)
    assert features(fashion, "thumbnail-48").shape == (7, 16)
    torch.testing.assert_close(features(fashion, chunk=2), features(fashion), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="choose one of digits-mlp-64"):
        features(fashion, "vgg")
    fashion[3, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="row 3"):
        features(fashion)


def test_missing_extras_and_weights_say_what_to_do(replace_inception):
    message = r"no_such_module is not installed: pip install 'cpsample\[metrics\]'"
    with pytest.raises(ImportError, match=message):
        import_optional("no_such_module.part", "metrics")

    class Extractor:
        def __init__(self, *args):
            raise OSError("no route to host")

    replace_inception(Extractor)
    with pytest.raises(OSError, match="connect to the network, or use another feature space"):
        inception_features(torch.zeros(2, 1, 28, 28))


def test_inception_gets_bytes_in_three_channels(replace_inception):
    given = []

    class Extractor(torch.nn.Module):
        def __init__(self, *args):
            super().__init__()

        def forward(self, x):
            given.append(x)
            return (x.float().mean((1, 2, 3))[:, None],)

    replace_inception(Extractor)
    greys = torch.linspace(-1.2, 1.2, 5).view(5, 1, 1, 1)
    features(greys.expand(5, 1, 4, 4), "inception-2048")
    assert given[0].dtype == torch.uint8 and given[0].shape == (5, 3, 4, 4)
    assert given[0][:, 0, 0, 0].tolist() == [0, 51, 128, 204, 255]
