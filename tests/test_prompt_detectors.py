"Judges of the caption: what a caption changes, who is asked, and a study that counts refusals."

import functools
import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import nn

from cpsample.core.ddpm import final_sample, sample
from cpsample.judgement.inference import auc
from cpsample.production import stable_diffusion_study as study
from cpsample.production.pipelines import schedule_of
from cpsample.production.stable_diffusion import (
    BAG,
    CAPTIONS,
    CaptionLook,
    Listener,
    alignment,
    caption_look,
    caption_scores,
    embed_captions,
    load_collapsed,
    magnitude,
    new_scheduler,
)
from cpsample.production.stable_diffusion_study import DetectorSettings, count_refused
from cpsample.workshop.files import data_path
from cpsample.workshop.studies import Study, Workspace, run_study

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
FEW = DetectorSettings(
    seeds=(0,), requests=4, group=2, steps=4, early=2, shares=(0.5,), spreads=(0.4,), each=1
)
SCHEDULE = schedule_of(new_scheduler())


class AddsWords(nn.Module):
    "A network that predicts x_t plus a multiple of the mean of the words; it counts its calls."

    def __init__(self, factor):
        super().__init__()
        self.factor, self.calls = factor, 0

    def forward(self, x_t, t, encoder_hidden_states, return_dict=False):
        self.calls += 1
        words = encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1)
        return (x_t + self.factor * words * torch.ones_like(x_t),)


def planted(factor):
    "A pipeline of the parts that a look needs."
    return SimpleNamespace(unet=AddsWords(factor), scheduler=new_scheduler())


def noise_of(n, seed=0):
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


WORDS, BLANK = torch.ones(3, 6, 8), torch.zeros(1, 6, 8)


@pytest.fixture(scope="module")
def court():
    return study.load_court()


def test_a_caption_that_changes_nothing_scores_nothing():
    scores = caption_scores(caption_look(planted(0.0), WORDS, BLANK), noise_of(3), SCHEDULE)
    assert [score.tolist() for score in scores] == [[0.0] * 3] * 3


@pytest.mark.parametrize("factor", [0.5, -2.0])
def test_the_magnitude_is_the_length_of_the_change(factor):
    look = caption_look(planted(factor), WORDS, BLANK)
    scores = caption_scores(look, noise_of(3), SCHEDULE, weight=3.0)
    torch.testing.assert_close(scores.magnitude, torch.full((3,), abs(factor) * 256**0.5))

    # The cosine of a vector with one of equal numbers is its sum over its length, times a half.
    x_t = noise_of(3)
    cosine = x_t.sum(1) / x_t.norm(dim=1) / 2
    expected = cosine.mean((1, 2)) * (1 if factor > 0 else -1)
    torch.testing.assert_close(scores.alignment, expected)
    torch.testing.assert_close(scores.combined, scores.magnitude + 3 * scores.alignment)


def test_a_row_is_judged_by_itself_and_alignment_does_not_see_lengths():
    without, change = noise_of(4), noise_of(4, seed=1)
    both = CaptionLook(without, change)
    for score in (magnitude, alignment):
        one = score(CaptionLook(without[2:3], change[2:3]))
        torch.testing.assert_close(score(both)[2:3], one)
    longer = CaptionLook(5 * without, 0.1 * change)
    torch.testing.assert_close(alignment(longer), alignment(both))
    torch.testing.assert_close(magnitude(longer), 0.1 * magnitude(both))


def test_alignment_is_asked_at_the_low_level_and_magnitude_at_the_top():
    asked = []

    def look(x_t, t):
        asked.append(t.tolist())
        return CaptionLook(x_t, x_t)

    caption_scores(look, noise_of(2), SCHEDULE, low=7)
    assert asked == [[999, 999], [7, 7]]
    with pytest.raises(ValueError, match="1000"):
        caption_scores(look, noise_of(2), SCHEDULE, low=1000)


def test_guidance_is_what_is_answered_and_the_change_what_is_noted():
    pipe = planted(0.5)
    listener = Listener(pipe, WORDS, BLANK, scale=4.0)
    x_t, t = noise_of(3), torch.tensor([999, 500, 0])
    torch.testing.assert_close(listener(x_t, t), x_t + 4 * 0.5)
    listener(x_t, t)
    assert len(listener.magnitudes) == 2 and pipe.unet.calls == 4
    torch.testing.assert_close(listener.magnitudes[0], torch.full((3,), 8.0))


def test_the_price_is_what_is_called():
    pipe, prices = planted(0.5), study.prices(FEW)
    look = caption_look(pipe, WORDS, BLANK)
    caption_scores(look, noise_of(3), SCHEDULE)
    assert pipe.unet.calls == prices["magnitude and alignment"].network == 4
    pipe.unet.calls = 0
    listener = Listener(pipe, WORDS, BLANK)
    walk = sample(listener, SCHEDULE, (3, 4, 8, 8), steps=FEW.steps, eta=0.0)
    next(walk)
    assert pipe.unet.calls == prices["magnitude, first step"].network == 2
    next(walk)
    assert pipe.unet.calls == prices["guard, early prediction"].network  # FEW.early is 2
    final_sample(walk)
    assert pipe.unet.calls == prices["magnitude, all steps"].network == 2 * FEW.steps


def test_a_planted_caption_is_told_with_certainty():
    "Memorised: it changes the prediction ten times as much."
    scores = []
    for factor, seed in ((1.0, 0), (0.1, 1)):
        look = caption_look(planted(factor), torch.ones(20, 6, 8), BLANK)
        scores.append(caption_scores(look, noise_of(20, seed), SCHEDULE).magnitude)
    assert auc(*scores)[0] == 1


def test_a_pipeline_without_text_guidance_is_refused_in_one_line():
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    pipe = DDPMPipeline(unet, DDPMScheduler())
    with pytest.raises(ValueError, match="DDPMPipeline has no text guidance") as refused:
        embed_captions(pipe, ["a bag"])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "setting", [{"time_cond_proj_dim": 8}, {"addition_embed_type": "text_time"}]
)
def test_a_network_that_is_not_asked_twice_with_words_alone_is_refused(setting):
    config = {"cross_attention_dim": 8} | setting
    pipe = SimpleNamespace(unet=SimpleNamespace(config=config), encode_prompt=None)
    with pytest.raises(ValueError, match="no text guidance"):
        embed_captions(pipe, ["a bag"])


def test_as_many_captions_as_images():
    pipe = load_collapsed()
    look = caption_look(pipe, *embed_captions(pipe, CAPTIONS[:2]))
    with pytest.raises(ValueError, match="2 rows for 3 images"):
        caption_scores(look, noise_of(3), SCHEDULE)


def test_the_same_noise_is_judged_alike_and_other_noise_otherwise(court):
    embedding = court.embeddings[BAG].repeat(2, 1, 1)
    judge = functools.partial(study.judge_requests, court, embedding, FEW)
    first, again, other = judge(seed=0), judge(seed=0), judge(seed=1)
    for name, scores in first.items():
        assert torch.equal(scores, again[name])
    for name in study.prices(FEW):
        assert not torch.equal(first[name], other[name])

    # What is said before anything is drawn cannot depend on how it is drawn.
    steered = judge(seed=0, guarded=True)
    for name in ("magnitude, first step", "alignment", "magnitude and alignment"):
        assert torch.equal(first[name], steered[name])
    assert not torch.equal(first["guard, finished picture"], steered["guard, finished picture"])
    torch.testing.assert_close(first["magnitudes"][:, 0], first["magnitude, first step"])


def test_mixed_and_moved_embeddings_lie_between_and_keep_their_length(court):
    bag = court.embeddings[BAG]
    length = torch.full((9,), bag.norm().item())
    mixed = study.mixed_embeddings(court, 0.5, 1)
    torch.testing.assert_close(mixed.flatten(1).norm(dim=1), length)
    torch.testing.assert_close(study.mixed_embeddings(court, 1.0, 2), bag.repeat(18, 1, 1))
    only_others = study.mixed_embeddings(court, 0.0, 1)
    aligned = torch.cosine_similarity(only_others.flatten(1), bag.flatten()[None])
    assert (aligned < 0.999).all()
    moved = study.moved_embeddings(court, 0.4, 9)
    torch.testing.assert_close(moved.flatten(1).norm(dim=1), length)
    torch.testing.assert_close(study.moved_embeddings(court, 0.0, 2), bag.repeat(2, 1, 1))
    assert torch.equal(moved, study.moved_embeddings(court, 0.4, 9))


def test_refusals_are_counted_for_all_and_for_copies():
    judged = {
        "copied": torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]),
        "sees": torch.tensor([5.0, 4.0, 1.0, 2.0, 0.0]),
        "blind": torch.tensor([1.0, 3.0, 3.0, 3.0, 1.0]),
    }
    counted = count_refused(judged, {"sees": 1.5, "blind": 3.0})
    assert (counted["copies"]["k"], counted["copies"]["n"]) == (2, 5)
    sees, blind = counted["judges"]["sees"], counted["judges"]["blind"]
    assert (sees["refused"]["k"], sees["copies_refused"]["k"], sees["auc"][0]) == (3, 2, 1)
    assert (blind["refused"]["k"], blind["copies_refused"]["k"]) == (0, 0)

    # Without copies nothing is said of them.
    judged["copied"].zero_()
    clean = count_refused(judged, {"sees": 1.5})["judges"]["sees"]
    assert clean["copies_refused"] is None and clean["auc"] is None


def test_groups_come_out_even():
    assert study.in_groups(torch.tensor([1.0, 3.0, 5.0, 9.0]), 2).tolist() == [2.0, 7.0]
    with pytest.raises(ValueError, match="5 scores are no whole number of groups of 2"):
        study.in_groups(torch.zeros(5), 2)


def shape_of(record):
    "Keys and kinds of values; lists are lists, numbers numbers or None."
    if isinstance(record, dict):
        return {key: shape_of(value) for key, value in record.items()}
    if isinstance(record, list):
        return "list"
    return "number" if isinstance(record, (int, float, type(None))) else "text"


def test_a_small_study_has_the_shape_of_the_file_on_record(court, tmp_path, monkeypatch):
    "And what was judged is not judged again."
    monkeypatch.setattr(study, "load_court", lambda: court)
    small = Study("prompt_detectors", functools.partial(study.measure_detectors, settings=FEW))
    workspace = Workspace(tmp_path, progress=False)
    record = run_study(small, tmp_path, workspace)
    on_file = json.loads(data_path("results/prompt_detectors.json").read_text())
    for key in ("n", "copies", "prices", "thresholds", "by_caption", "by_step"):
        assert shape_of(record[key]) == shape_of(on_file[key])
    for of, verdicts in record["told"].items():
        assert list(verdicts) == list(on_file["told"][of]) == list(study.prices(FEW))
    assert record["n"] == {"collapsed": 4, "innocent": 36}
    assert set(record["situations"]) <= set(on_file["situations"])
    assert [s["copies"]["n"] for s in record["situations"].values()] == [4, 4, 4, 9, 9, 9]

    (tmp_path / "judged-3.json").unlink()
    judged = []

    def watched(court, kind, settings, **how):
        judged.append(kind)
        return real(court, kind, settings, **how)

    real = study._judge_caption
    monkeypatch.setattr(study, "_judge_caption", watched)
    assert run_study(small, tmp_path, workspace)["told"] == record["told"]
    assert judged == [3]
