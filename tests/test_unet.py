"The U-Net and its classifier: rows apart, any size that can be halved, right gradients."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cpsample.core.guard import push
from cpsample.practice.unet import SelfAttention, UNet, UNetClassifier
from cpsample.workshop.registry import build_network


def awake(module):
    "Random weights in place of zeros."
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.2, generator=generator)
    return module


@settings(max_examples=15, deadline=None)
@given(
    channels=st.sampled_from([1, 3]),
    halvings=st.integers(0, 2),
    unshuffle=st.sampled_from([1, 2]),
    blocks=st.integers(1, 2),
    h=st.integers(1, 3),
    w=st.integers(1, 3),
    attention=st.booleans(),
)
def test_shapes_and_independent_rows(channels, halvings, unshuffle, blocks, h, w, attention):
    step = unshuffle * 2**halvings
    shape = (channels, 2 * h * step, 2 * w * step)
    options = dict(
        width=8,
        mults=(1,) + (2,) * halvings,
        blocks=blocks,
        unshuffle=unshuffle,
        attention=attention,
    )
    x, t = torch.randn(3, *shape), torch.tensor([0, 500, 999])
    for network, shape_of_answer in (
        (awake(UNet(shape, **options)), shape),
        (awake(UNetClassifier(shape, 5, **options)), (5,)),
    ):
        y = network(x, t)
        assert y.shape == (3, *shape_of_answer) and y.std() > 0
        torch.testing.assert_close(network(x[1:2], t[1:2]), y[1:2], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(network(x[:1], t[1:2]), y[:1], atol=1e-4), (
            "the noise level must matter"
        )
        twin = build_network(type(network).__name__, network.config)
        twin.load_state_dict(network.state_dict())
        assert torch.equal(twin(x, t), y)


def test_memory_order_changes_nothing():
    network = awake(UNet((1, 28, 28), width=16))
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([3, 700])
    y = network(x, t)
    network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(x, t), y, atol=1e-5, rtol=1e-4)


def test_push_of_the_classifier_against_finite_differences():
    network = awake(UNetClassifier((1, 8, 8), 3, width=8)).double()
    x, direction = torch.randn(2, 2, 1, 8, 8, dtype=torch.float64)
    t = torch.tensor([10, 300])
    z = network(x, t)

    def objective(x):
        return nn.functional.logsigmoid(-z.sign() * network(x, t)).mean(1)

    step = 1e-5 * direction
    numeric = (objective(x + step) - objective(x - step)) / 2e-5
    exact = (push(network, x, t, form="toward") * direction).flatten(1).sum(1)
    torch.testing.assert_close(exact, numeric, atol=1e-7, rtol=1e-5)


def test_attention_does_not_care_about_the_order_of_places():
    attention, h, order = awake(SelfAttention(16)), torch.randn(2, 16, 4, 4), torch.randperm(16)
    shuffled = h.flatten(2)[..., order].view_as(h)
    y = attention(h).flatten(2)
    torch.testing.assert_close(attention(shuffled).flatten(2), y[..., order], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(shape=(1, 28, 28), mults=(1, 2, 2)), "cannot be divided by 8"),
        (dict(shape=(1, 27, 28)), "cannot be divided by 4"),
        (dict(shape=(1, 28, 28), width=12), "multiple of 8"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    for network in (UNet, UNetClassifier):
        with pytest.raises(ValueError, match=message):
            network(**options)


def test_unknown_network_is_refused():
    with pytest.raises(ValueError, match="choose one of MLPDenoiser"):
        build_network("ResNet", {})
