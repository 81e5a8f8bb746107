"The attack on the collapsed caption's embedding: services, counts, and a run that was stopped."

import json
from functools import partial

import pytest
import torch

from cpsample.judgement.guard_attacks import Searched
from cpsample.production import stable_diffusion_study as study
from cpsample.production.stable_diffusion_study import (
    CaptionSettings,
    attack_caption,
    choose_embeddings,
    draw_from,
    load_captioned,
    measure_caption_attacks,
)
from cpsample.workshop.files import data_path
from cpsample.workshop.studies import Study, Workspace, run_study

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::cpsample.core.calibration.UncoveredMemberWarning"),
]
pytest.importorskip("diffusers")
FEW = CaptionSettings(rows=2, asks=2, steps=3, through=2, again=1)


@pytest.fixture(scope="module")
def captioned():
    return load_captioned(FEW)


@pytest.fixture
def loaded_once(captioned, monkeypatch):
    monkeypatch.setattr(study, "load_captioned", lambda settings: captioned)


def test_a_service_pushes_where_its_name_says(captioned):
    assert list(captioned.services) == ["unguarded", "pushed at x_t", "pushed at x̂₀"]
    services = {name: serve(captioned.embedding) for name, serve in captioned.services.items()}
    assert services["unguarded"].accept is None
    places = {name: service.model.guard.at for name, service in list(services.items())[1:]}
    assert places == {"pushed at x_t": "x_t", "pushed at x̂₀": "x0"}

    # The last word: members are refused, noise is not.
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for name in places:
        assert not services[name].verdict(captioned.latents[:3]).any()
        assert services[name].verdict(noise).all()


def test_served_copies_are_counted_as_pictures(captioned):
    latents = torch.cat([captioned.latents[[0, 0, 5]], torch.zeros(1, 4, 8, 8)])
    accepted = torch.tensor([True, False, True, True])
    counts = study._counted(captioned, Searched(latents, latents, accepted))
    assert (counts["queries"], counts["withheld"], counts["copies"]) == (4, 1, 2)
    assert (counts["copies_unchecked"], counts["members"], counts["near"]) == (3, 2, 0)


def test_what_is_to_become_small_is_the_distance_to_who_is_wanted(captioned, monkeypatch):
    losses = {}

    def attack(serve, start, noise, loss, **options):
        losses[options.get("through")] = loss(captioned.latents[[0, 7]])

    monkeypatch.setattr(study, "embedding_by_gradient", attack)
    monkeypatch.setattr(study, "embedding_by_search", attack)
    choose = partial(choose_embeddings, captioned, captioned.services["unguarded"], FEW)
    choose(how="gradient", known=False)
    assert losses[2].tolist() == [0, 0]
    for how, through in (("gradient", 2), ("search", None)):
        choose(how=how)
        assert losses[through][0] == 0 < losses[through][1]


def test_each_ask_has_noise_of_its_own(captioned):
    serve = captioned.services["unguarded"]
    start = captioned.embedding.repeat(2, 1, 1)
    drawn = draw_from(serve, start, FEW, times=2, seed=0)
    assert len(drawn.images.flatten(1).unique(dim=0)) == 4
    assert torch.equal(drawn.images, draw_from(serve, start, FEW, times=2, seed=0).images)


def test_a_small_study_has_the_shape_of_the_file_on_record(loaded_once, tmp_path, monkeypatch):
    "And a service that was attacked is not attacked again."
    small = Study("caption_attacks", partial(measure_caption_attacks, settings=FEW))
    workspace = Workspace(tmp_path, progress=False)
    record = run_study(small, tmp_path, workspace)
    on_file = json.loads(data_path("results/caption_attacks.json").read_text())
    assert record.keys() == on_file.keys() and record["checks"].keys() == on_file["checks"].keys()
    assert list(record["attacks"]) == list(on_file["attacks"])
    for service, attacks in record["attacks"].items():
        assert list(attacks) == list(on_file["attacks"][service])
        for attack, counts in attacks.items():
            assert counts.keys() == on_file["attacks"][service][attack].keys()
    queries = {attack: counts["queries"] for attack, counts in attacks.items()}
    assert list(queries.values()) == [4, 4, 6, 6, 2, 2]

    (tmp_path / "service-1.json").unlink()
    attacked = []

    def watched(captioned, name, settings):
        attacked.append(name)
        return attack_caption(captioned, name, settings)

    monkeypatch.setattr(study, "attack_caption", watched)
    assert run_study(small, tmp_path, workspace)["attacks"] == record["attacks"]
    assert attacked == ["pushed at x_t"]
