"Guards of the predicted picture that are certain of a lot, without training: for several tests."

import torch
from torch import nn

from cpsample.core.classifier import MLPClassifier
from cpsample.core.ddpm import seeded
from cpsample.core.guard import Guard
from cpsample.core.schedule import make_schedule

SCHEDULE = make_schedule()


def probe(K=3, shape=(1, 4, 4), scale=3.0):
    "A classifier that is certain of many pictures."
    network = seeded(0, lambda: MLPClassifier(shape, K=K, width=32))
    generator = torch.Generator().manual_seed(1)
    nn.init.normal_(network.out.weight, std=scale, generator=generator)
    return network


def looking(classifier=None, **changes):
    "A guard that is asked about the predicted picture, at every level."
    options = dict(alpha=0.3, scale=2.5, at="x0", t_max=1000, longest=10.0) | changes
    return Guard(classifier or probe(), SCHEDULE, **options)


def pictures(n, seed=0, shape=(1, 4, 4)):
    "Standard normal noise [n, *shape]."
    return torch.randn((n, *shape), generator=torch.Generator().manual_seed(seed))
