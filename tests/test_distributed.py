"Two real processes, with the same global batch, give the losses of one: denoiser and guard. Labels follow the image, not the process."

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpsample.core.ddpm import MLPDenoiser, seeded
from cpsample.practice.datasets import load_fashion
from cpsample.practice.runs import CONFIGS, train_denoiser
from cpsample.practice.training import fit
from cpsample.workshop.parallel import Together

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo over fork")
STEPS = 50
CONFIG = replace(
    CONFIGS["fashion"].tiny(), steps=STEPS, batch_size=16, every=25, guard_steps=STEPS, mirror=True
)


def both(folder, accelerator=None):
    "50 steps of denoiser and guard; each process writes its losses and what labels it saw."
    from cpsample.core.classifier import member_labels
    from cpsample.core.guard import fit_guard
    from cpsample.core.images import pixels
    from cpsample.core.schedule import make_schedule
    from cpsample.practice.unet import UNetClassifier

    torch.set_num_threads(1)
    x = load_fashion(small=True)[0][:40]
    _, schedule, losses = train_denoiser(CONFIG, x, folder, accelerator=accelerator, progress=False)
    torch.manual_seed(0)
    classifier, found = UNetClassifier((1, 28, 28), 8, width=8), []

    def drive(model, loss, data, steps, **how):
        found.extend(
            fit(
                model,
                loss,
                data,
                steps,
                folder / "guard.safetensors",
                accelerator=accelerator,
                progress=False,
                **how,
            )[1]
        )

    fit_guard(
        pixels(x), make_schedule(), steps=STEPS, batch_size=16, classifier=classifier, drive=drive
    )
    plain = seeded(0, lambda: MLPDenoiser((1, 28, 28), 8))
    net = Together(accelerator.prepare(plain)) if accelerator else plain
    (
        net(pixels(x[:16]), torch.arange(16)) - 1
    ).square().mean().backward()  # Adam hides a wrong factor on all gradients, so look at them
    save_file(
        {name: p.grad.clone() for name, p in plain.named_parameters()},
        folder / f"gradient-{accelerator.process_index if accelerator else 0}.safetensors",
    )
    rank = accelerator.process_index if accelerator else 0
    (folder / f"{rank}.json").write_text(
        json.dumps({"denoiser": losses, "guard": found, "labels": member_labels(x, 8, 0).tolist()})
    )


def worker(folder):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    both(folder, accelerator)


def test_two_processes_give_the_losses_of_one(tmp_path):
    launcher = pytest.importorskip("accelerate").debug_launcher
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir(), together.mkdir()
    both(alone)
    launcher(worker, args=(together,), num_processes=2)
    one, *two = (
        json.loads(p.read_text())
        for p in (alone / "0.json", together / "0.json", together / "1.json")
    )
    wanted = load_file(alone / "gradient-0.safetensors")
    for k in (0, 1):
        torch.testing.assert_close(
            load_file(together / f"gradient-{k}.safetensors"), wanted, atol=1e-6, rtol=1e-4
        )
    assert max(g.abs().max() for g in wanted.values()) > 1e-3
    for part in ("denoiser", "guard"):
        for other in two:
            torch.testing.assert_close(
                torch.tensor(other[part]), torch.tensor(one[part]), atol=1e-4, rtol=0
            )
        assert len(one[part]) == STEPS and one[part][-1] < one[part][0]
    assert one["labels"] == two[0]["labels"] == two[1]["labels"]


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="make it a multiple of 2"):
        Together(MLPDenoiser((1, 8, 8), 8))(
            torch.zeros(3, 1, 8, 8), torch.zeros(3, dtype=torch.long)
        )
