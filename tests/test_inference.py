"The referee: known AUCs, honest halves, no more false accusations than were allowed."

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from cpsample.judgement.inference import attack_table, auc, infer, loss_test, verdicts


def seed(n):
    return torch.Generator().manual_seed(n)


FEW_SCORES = st.lists(st.integers(0, 5), min_size=2, max_size=30)


@settings(deadline=None, max_examples=60)
@given(FEW_SCORES, FEW_SCORES)
def test_auc_is_scikit_learns_with_ties(a, b):
    value, (low, high) = auc(torch.tensor(a).double(), torch.tensor(b).double(), boots=50)
    assert value == pytest.approx(roc_auc_score([1] * len(a) + [0] * len(b), a + b))
    assert 0 <= low <= high <= 1


def test_the_interval_covers_the_known_auc_as_often_as_it_says():
    exact, covered = norm.cdf(math.sqrt(0.5)), 0
    for k in range(100):
        g = seed(k)
        members, others = torch.randn(60, generator=g) + 1, torch.randn(80, generator=g)
        _, (low, high) = auc(members, others, boots=300, seed=k)
        covered += low < exact < high
    assert 88 <= covered <= 100


def test_choosing_among_useless_attacks_gains_nothing():
    "Had the choice been made on the images that are counted, fifty would look like a useful one."
    g, values = seed(0), []
    for k in range(20):
        scores = {
            i: (torch.randn(50, generator=g), torch.randn(100, generator=g)) for i in range(50)
        }
        values.append(infer(scores, boots=10, seed=k)["auc"])
    assert abs(sum(values) / 20 - 0.5) < 0.02


def test_threshold_sign_and_choice_on_known_laws():
    g = seed(0)
    a, b = torch.randn(4000, generator=g) + 2, torch.randn(4000, generator=g)
    noise = torch.randn(4000, generator=g), torch.randn(4000, generator=g)
    verdict = infer({"noise": noise, "signal": (-a, -b)}, fprs=(0.1, 0.01, 1e-4))
    assert verdict["chosen"] == [("signal", -1)] * 2
    for f in (0.1, 0.01):
        low, high = verdict["tpr_ci"][f]
        assert low - 0.03 < norm.sf(norm.isf(f) - 2) < high + 0.03
        assert abs(verdict["fpr"][f] - f) < 0.5 * f
    assert verdict["tpr"][1e-4] is None and verdict["fpr"][1e-4] is None
    assert verdict["auc_ci"][0] < norm.cdf(2 / math.sqrt(2)) < verdict["auc_ci"][1]


def test_the_threshold_comes_from_the_other_half():
    "A threshold of the counted half would accuse exactly the share asked for, every time."
    g, rates = seed(0), []
    for k in range(20):
        scores = {"x": (torch.randn(40, generator=g), torch.randn(40, generator=g))}
        rates.append(infer(scores, fprs=(0.1,), boots=10, seed=k)["fpr"][0.1])
    assert len(set(rates)) > 4 and 0.05 < sum(rates) / 20 < 0.2


def test_no_more_false_accusations_than_were_allowed():
    """On average over many audiences: k of n + 1.

    That is the rate asked for where it makes n + 1 a multiple, and never above it.
    """
    g, rates = seed(1), {n: [] for n in (60, 198)}
    for n, kept in rates.items():
        for k in range(300):
            scores = {"x": (torch.arange(20.0), torch.rand(n, generator=g))}
            kept.append(infer(scores, fprs=(0.05,), boots=2, seed=k)["fpr"][0.05])
    assert 0.02 < sum(rates[60]) / 300 < 0.045  # halves of 30: one of 31 allowed
    assert abs(sum(rates[198]) / 300 - 0.05) < 0.004  # halves of 99: five of 100


def test_the_best_attacker_does_not_hold_the_guard():
    g = seed(0)
    weak = torch.randn(100, generator=g) + 0.5, torch.randn(100, generator=g)
    results = verdicts({"weak": weak, "oracle": (torch.ones(100), torch.zeros(100))})
    assert results["oracle"]["auc"] == 1
    assert results["best of all"]["turned"]["chosen"] == [("weak", 1)] * 2
    lines = attack_table(results).splitlines()
    assert "0.9" not in lines[-1][:22]
    assert [line.split()[0] for line in lines[1:]] == ["weak", "oracle", "best"]


def test_loss_test_is_one_sided():
    a, b = torch.randn(400, generator=seed(0)), torch.randn(400, generator=seed(1))
    assert loss_test(a + 1, b)[0] > 10
    assert loss_test(a + 1, b)[1] < 1e-6
    assert loss_test(a - 1, b)[1] > 0.999


@pytest.mark.parametrize(
    "a, b, words",
    [
        (torch.tensor([1.0]), torch.zeros(5), "members"),
        (torch.zeros(5), torch.tensor([]), "others"),
        (torch.tensor([1.0, float("nan")]), torch.zeros(5), "NaN"),
        (torch.zeros(3, 2), torch.zeros(5), "two numbers"),
    ],
)
def test_bad_scores_are_refused(a, b, words):
    with pytest.raises(ValueError, match=words):
        auc(a, b)
    with pytest.raises(ValueError, match=words):
        infer({"x": (a, b)})


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_scores_that_are_all_the_same_tell_nothing(kind):
    "Such as those of `nearest_sample_attack`, when everything was copied: no warning, no NaN."
    zeros, ones = torch.zeros(30, dtype=kind), torch.ones(20, dtype=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loss_test(zeros, zeros[:20]) == (0, 0.5)
        assert auc(zeros, zeros)[0] == 0.5
    varied = torch.arange(30).to(kind)
    assert loss_test(varied, ones)[1] < 0.001 < 0.999 < loss_test(ones, varied)[1]
    with pytest.raises(ValueError, match="NaN"):
        loss_test(zeros / 0, ones)
