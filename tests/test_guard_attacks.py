"Attacks on guarded generators: a planted truth for each."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cpsample.core.ddpm import MLPDenoiser, final_sample, sample, seeded, timesteps
from cpsample.core.guard import fit_guard
from cpsample.core.images import load_digits
from cpsample.core.protection import protect
from cpsample.core.schedule import make_schedule, x0_to_eps
from cpsample.judgement.guard_attacks import (
    Observed,
    Service,
    count_copies,
    distance_to,
    distance_to_any,
    embedding_by_gradient,
    embedding_by_search,
    fresh_share,
    img2img,
    inpaint,
    levels_below,
    noise_by_gradient,
    noise_by_search,
    observe,
    of_length,
    scores_of_observers,
    unfamiliar_copies,
    walk,
)

SCHEDULE = make_schedule()


def noise(n, seed=0):
    return torch.randn((n, 1, 8, 8), generator=torch.Generator().manual_seed(seed))


def numbered(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def toy_model():
    "An untrained digit denoiser whose output is not zero."

    def build():
        model = MLPDenoiser((1, 8, 8), width=64)
        nn.init.normal_(model.out.weight, std=0.1)
        return model.eval().requires_grad_(False)

    return seeded(0, build)


def silent(x_t, t):
    "A model that sees no noise: the image that it has in mind is x_t, made larger and clipped."
    return torch.zeros_like(x_t)


@given(eta=st.sampled_from([0.0, 0.3, 1.0]), steps=st.integers(2, 12))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_a_walk_from_noise_is_the_sampler(toy_model, eta, steps):
    options = {"steps": steps, "eta": eta}
    drawn = sample(toy_model, SCHEDULE, (3, 1, 8, 8), clip=1, generator=numbered(), **options)
    generator = numbered()
    start = torch.randn((3, 1, 8, 8), generator=generator)
    with torch.no_grad():
        walked = walk(toy_model, SCHEDULE, start, generator=generator, **options)
    torch.testing.assert_close(walked, final_sample(drawn), atol=1e-3, rtol=1e-3)


def test_fresh_noise_has_the_variance_of_ddpm():
    abar, below = SCHEDULE.abar[500].item(), SCHEDULE.abar[499].item()
    variance = (1 - below) / (1 - abar) * (1 - abar / below)
    assert fresh_share(abar, below, 1.0) ** 2 * (1 - below) == pytest.approx(variance)
    assert fresh_share(abar, below, 0.0) == 0


def test_strength_says_where_a_walk_starts():
    assert levels_below(SCHEDULE, 1.0, 20) == timesteps(1000, 20)
    assert levels_below(SCHEDULE, 0.105, 20) == [105, 53, 0]
    for strength, steps, words in (
        (0, 20, "strength must"),
        (1.2, 20, "strength"),
        (0.1, 5, "more"),
    ):
        with pytest.raises(ValueError, match=words):
            levels_below(SCHEDULE, strength, steps)


def test_known_pixels_stay_and_others_are_not_looked_at(toy_model):
    x, known = noise(4).clamp(-1, 1), torch.zeros(1, 8, 8, dtype=torch.bool)
    known[:, :3] = True
    filled = inpaint(toy_model, SCHEDULE, x, known, steps=5, generator=numbered())
    assert torch.equal(filled[:, :, :3], x[:, :, :3])
    assert not torch.equal(filled, x)
    blind = torch.where(known, x, torch.zeros(()))
    assert torch.equal(
        filled, inpaint(toy_model, SCHEDULE, blind, known, steps=5, generator=numbered())
    )


def test_the_model_is_shown_the_known_pixels_at_every_level():
    "As noisy as the level is: at the last one nearly as they are."
    shown, x = [], noise(300).clamp(-1, 1)
    known = torch.zeros(1, 8, 8, dtype=torch.bool)
    known[:, :3] = True

    def watching(x_t, t):
        shown.append(x_t)
        return torch.zeros_like(x_t)

    inpaint(watching, SCHEDULE, x, known, steps=4, generator=numbered())
    for x_t, level in zip(shown, timesteps(1000, 4)):
        abar = SCHEDULE.abar[level]
        off = (x_t - abar.sqrt() * x)[:, :, :3]
        assert off.std() == pytest.approx((1 - abar).sqrt().item(), rel=0.05)


def test_a_little_noise_changes_little(toy_model):
    x = noise(5).clamp(-1, 1)
    near, far = (
        img2img(toy_model, SCHEDULE, x, strength, generator=numbered()) for strength in (0.06, 0.9)
    )
    assert (near - x).norm() < (far - x).norm() / 2


def test_refused_requests_are_drawn_again_and_counted():
    asked = []

    def draw(rows):
        asked.append(rows.tolist())
        return torch.full((len(rows), 1), float(len(asked))) + rows[:, None] / 10

    service = Service(silent, SCHEDULE, lambda x: x[:, 0] >= torch.tensor(2.0), tries=3)
    answer = service.answer(draw, 2)
    assert asked == [[0, 1], [0, 1]] and answer.tries.tolist() == [2, 2]

    asked.clear()
    service = Service(silent, SCHEDULE, lambda x: x[:, 0] % 1 > 0.05, tries=3)
    answer = service.answer(draw, 2)
    assert answer.tries.tolist() == [3, 1] and answer.accepted.tolist() == [False, True]
    assert asked == [[0, 1], [0], [0]]
    assert answer.images[:, 0].tolist() == pytest.approx([3.0, 1.1])


def test_a_service_without_a_judge_serves_everything_at_once(toy_model):
    seen = observe(Service(toy_model, SCHEDULE), noise(3).clamp(-1, 1), 0.3, asks=2)
    assert seen.tries.tolist() == [1, 1, 1] and seen.withheld.tolist() == [0, 0, 0]
    assert (seen.distance > 0).all()


def test_what_never_comes_is_seen_as_withheld(toy_model):
    x = torch.stack([torch.full((1, 8, 8), 0.9), torch.full((1, 8, 8), -0.9)])
    is_dark = Service(toy_model, SCHEDULE, lambda x: x.flatten(1).mean(1) < 0, tries=4)
    seen = observe(is_dark, x, 0.06, asks=3)
    assert seen.tries.tolist() == [4, 1] and seen.withheld.tolist() == [1, 0]
    assert seen.distance.isnan().tolist() == [True, False]

    # One that never came scores in the middle.
    others = Observed(torch.ones(3), torch.zeros(3), torch.tensor([1.0, 2.0, 3.0]))
    members = Observed(torch.ones(1), torch.ones(1), torch.tensor([torch.nan]))
    near, far = scores_of_observers(members, others)["picture"]
    assert near.tolist() == [-2] and far.tolist() == [-1, -2, -3]


def test_a_gradient_finds_the_noise_of_a_picture(toy_model):
    service = Service(toy_model, SCHEDULE)
    with torch.no_grad():
        target = walk(toy_model, SCHEDULE, noise(4, 1), steps=5)
    searched = noise_by_gradient(service, noise(4), distance_to(target), steps=5, asks=40)
    losses = distance_to(target.repeat(41, 1, 1, 1))(searched.images).view(41, 4)
    assert (losses[-1] < losses[0]).all()
    lengths = searched.chosen.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((4,), 8.0))
    assert len(searched.images) == 4 * 41 and searched.accepted.all()


def test_a_search_keeps_what_is_served_and_nearer(toy_model):
    start, target = noise(6), noise(6, 1).clamp(-1, 1)
    kept = start.clone()
    searched = noise_by_search(
        Service(toy_model, SCHEDULE), start, distance_to(target), steps=5, asks=60
    )
    losses = distance_to(target.repeat(60, 1, 1, 1))(searched.images).view(60, 6)
    with torch.no_grad():
        found = walk(toy_model, SCHEDULE, searched.chosen, steps=5)
    torch.testing.assert_close(distance_to(target)(found), losses.amin(0), atol=1e-3, rtol=1e-3)
    assert torch.equal(start, kept)

    nothing = Service(toy_model, SCHEDULE, lambda x: torch.zeros(len(x), dtype=torch.bool))
    searched = noise_by_search(nothing, start, distance_to(target), steps=5, asks=3)
    assert torch.equal(searched.chosen, start) and not searched.accepted.any()


def painting(accept=None):
    "serve(embedding): a model that has the embedding in mind, and at high levels a half of it."

    def serve(embedding):
        mind = embedding.view(-1, 1, 2, 2)

        def model(x_t, t):
            share = torch.where(t > 500, 0.5, 1.0).view(-1, 1, 1, 1)
            return x0_to_eps(x_t, t, share * mind, SCHEDULE)

        return Service(model, SCHEDULE, accept)

    return serve


@pytest.mark.parametrize("attack", [embedding_by_gradient, embedding_by_search])
def test_an_embedding_is_found_that_says_what_is_wanted(attack):
    secret = torch.tensor([[0.6, 0.2, -0.3, 0.1], [-0.2, -0.5, 0.4, 0.3]])
    start = of_length(torch.ones(2, 4), secret.norm(dim=1))
    kept, blank = start.clone(), torch.zeros(2, 1, 2, 2)
    loss = distance_to(secret.view(2, 1, 2, 2))
    searched = attack(painting(), start, blank, loss, steps=4, asks=250)
    torch.testing.assert_close(searched.chosen, secret, atol=0.05, rtol=0)
    torch.testing.assert_close(searched.chosen.norm(dim=1), secret.norm(dim=1))
    assert torch.equal(start, kept) and len(searched.images) == len(searched.accepted)

    # Its length is kept on the way, too, whatever is wanted.
    far = distance_to(torch.full((2, 1, 2, 2), 0.9))
    on_the_way = attack(painting(), start, blank, far, steps=4, asks=5).chosen
    torch.testing.assert_close(on_the_way.norm(dim=1), secret.norm(dim=1))


def test_an_embedding_that_is_never_served_is_not_taken():
    never, start = painting(lambda x: torch.zeros(len(x), dtype=torch.bool)), torch.ones(2, 4)
    loss = distance_to(torch.zeros(2, 1, 2, 2))
    searched = embedding_by_search(never, start, torch.zeros(2, 1, 2, 2), loss, steps=3, asks=4)
    assert torch.equal(searched.chosen, start) and not searched.accepted.any()


def test_gradients_pass_through_the_last_levels_alone():
    "Two levels: the first has half of the embedding in mind, and noise passes on what it thought."
    embedding, blank = torch.full((1, 4), 0.2), torch.zeros(1, 1, 2, 2)
    calls = []

    def model_of(embedding):
        def model(x_t, t):
            eps = embedding.view(1, 1, 2, 2) * (t[0].item() + 1) / 1000
            calls.append(eps.requires_grad and torch.is_grad_enabled())
            return eps

        return model

    gradients = {}
    for through in (None, 1, 3):
        wanted = embedding.clone().requires_grad_()
        x = walk(model_of(wanted), SCHEDULE, blank, steps=3, clip=None, through=through)
        (gradients[through],) = torch.autograd.grad(x.sum(), wanted)
    assert calls == [True] * 3 + [False] * 2 + [True] + [True] * 3
    assert torch.equal(gradients[None], gradients[3])

    # Of the last level alone it is the derivative of −√(1−ᾱ)/√ᾱ · embedding / 1000.
    abar = SCHEDULE.abar[0]
    expected = -(((1 - abar) / abar).sqrt() / 1000).expand(1, 4)
    torch.testing.assert_close(gradients[1], expected)


def test_predictions_of_latents_are_not_clipped():
    large = painting()(torch.full((1, 4), 3.0))
    assert walk(large.model, SCHEDULE, torch.zeros(1, 1, 2, 2), steps=3).max() == 1
    free = walk(large.model, SCHEDULE, torch.zeros(1, 1, 2, 2), steps=3, clip=None)
    torch.testing.assert_close(free, torch.full((1, 1, 2, 2), 3.0))


def test_any_member_is_the_nearest_one():
    members = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    x = torch.tensor([[1.0, 0.0], [3.0, 2.0]], requires_grad=True)
    loss = distance_to_any(members)(x)
    assert loss.tolist() == [1, 4]
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert gradient.tolist() == [[2, 0], [0, 4]]


def test_only_served_copies_count():
    members = torch.stack([torch.full((1, 8, 8), value) for value in (-1.0, 0.0, 1.0)])
    images = torch.cat([members[[0, 0, 2]], torch.full((1, 1, 8, 8), 0.5)])
    counts = count_copies(images, torch.tensor([True, True, False, True]), members)
    assert (counts["queries"], counts["withheld"], counts["copies"], counts["members"]) == (
        4,
        1,
        2,
        1,
    )
    assert counts["worst"] == {"member": 0, "copies": 2} and counts["smallest_ratio"] == 0
    nothing = count_copies(images, torch.zeros(4, dtype=torch.bool), members)
    assert nothing["worst"] is None and nothing["smallest_ratio"] is None


def test_copies_that_a_guard_does_not_know_are_found_where_there_are_any():
    "A classifier that looks at one pixel alone is fooled by that pixel."

    def classifier(x_t, t):
        return 30 * (x_t[:, 0, 0, 0] - 0.5).unsqueeze(1)

    members = noise(8).clamp(-1, 1)
    members[:, 0, 0, 0] = 0.6
    guard = fit_guard(members, SCHEDULE, steps=1)
    object.__setattr__(guard, "classifier", classifier)
    found = unfamiliar_copies(guard, members, level=0, asks=50)
    assert classifier(found, None).abs().amax() < 0.5 < classifier(members, None).abs().amin()
    assert count_copies(found, torch.ones(8, dtype=torch.bool), members)["copies"] == 8


@pytest.mark.filterwarnings("ignore::cpsample.core.guard.UncalibratedGuardWarning")
def test_behind_a_push_gradients_pass_as_if_it_were_constant(toy_model):
    digits, _ = load_digits()
    members, reference = digits[:10], digits[100:300]
    guard = fit_guard(members, SCHEDULE, reference, steps=400)
    eps, gradients = [], []
    for model in (toy_model, protect(toy_model, guard)):
        x_t = members.clone().requires_grad_()
        eps.append(model(x_t, torch.full((10,), 20)))
        gradients.append(torch.autograd.grad(eps[-1].sum(), x_t)[0])
    assert not torch.allclose(*eps)  # it has stepped in
    torch.testing.assert_close(*gradients)
