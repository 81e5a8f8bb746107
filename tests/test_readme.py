"""Every block of the README is run as it is printed, on real pictures, with fewer steps and counts.

The first block of Python is a cell of nbs/index.ipynb, and runs there.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from real_pictures import save_pictures
from small_pipelines import QUIET

from cpsample.core.copying import copy_test
from cpsample.core.ddpm import seeded
from cpsample.core.images import pixels
from cpsample.practice.datasets import read_data
from cpsample.production.pipelines import fit_pipeline_guard, pipeline_samplers

# Pictures that are not square are what people have.
OBLONG = "ignore:.*are not square, their middles are taken"
pytestmark = [pytest.mark.filterwarnings(warning) for warning in (*QUIET, OBLONG)]
ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [
    (language, text)
    for _, language, text in re.findall(r"^(```|~~~)(\w+)\n(.*?)^\1$", README, re.M | re.S)
]
MEMBERS, OTHERS, UNSEEN = 3, 48, 24


def block(language, begins):
    "The one block that begins so."
    (text,) = [text for name, text in BLOCKS if name == language and text.startswith(begins)]
    return text


def commands(text):
    "The lines of a block of shell, as they are printed."
    return [line for line in text.splitlines() if line.strip()]


def environment(**settings):
    "What a child process sees: this package, one thread, and the settings."
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    own = {"PATH": os.pathsep.join(paths), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return os.environ | own | settings


def run(line, folder, **settings):
    "A line of shell as somebody types it: (exit status, what was printed)."
    ended = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=environment(**settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return ended.returncode, ended.stdout


def copies_of_40(printed):
    "What an audit of 40 images printed of the ratio test."
    (copies,) = re.findall(r"^ratio +(\d+) of 40", printed, re.M)
    return int(copies)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with the folders of pictures that the README speaks of."
    folder = tmp_path_factory.mktemp("readme")
    save_pictures(folder / "my_pictures", MEMBERS)
    save_pictures(folder / "other_pictures", OTHERS, first=MEMBERS)
    save_pictures(folder / "unseen_pictures", UNSEEN, first=MEMBERS + OTHERS)
    return folder


def test_each_block_is_one_of_these():
    begins = {
        ("bash", "make demo"),
        ("python", "from cpsample import ("),
        ("text", "torch.Size"),
        ("python", "from diffusers import"),
        ("bash", "cpsample train my_pictures"),
    }
    assert len(BLOCKS) == len(begins)
    for language, text in begins:
        assert block(language, text)


def test_make_demo_and_make_lab(tmp_path):
    demo, lab = commands(block("bash", "make demo"))

    # What these two install is there: no second environment is made for a test.
    installed = "-o .venv/installed -o .venv/installed-notebook"
    flags = f"{installed} BIN={Path(sys.executable).parent}"
    short = {
        "CPSAMPLE_DEMO_TRAIN_STEPS": "20",
        "CPSAMPLE_DEMO_GUARD_STEPS": "400",
        "CPSAMPLE_DEMO_SAMPLES": "16",
        "ARGS": f"--out {tmp_path}",
    }
    status, printed = run(demo, ROOT, MAKEFLAGS=flags, **short)
    assert status == 0 and "unguarded" in printed and (tmp_path / "demo.png").exists(), printed

    # A server has no end: JupyterLab is started, and says which it is.
    status, printed = run(lab, ROOT, MAKEFLAGS=flags, ARGS="--version")
    assert status == 0 and re.search(r"^\d+\.\d+\.\d+", printed, re.M), printed


def test_from_the_shell(place):
    train, guard, sample, audit, attack = commands(block("bash", "cpsample train"))
    short = {
        "CPSAMPLE_TRAIN_STEPS": "3000",
        "CPSAMPLE_TRAIN_BATCH_SIZE": "4",
        "CPSAMPLE_GUARD_STEPS": "150",
        "CPSAMPLE_AUDIT_NUMBER": "40",
    }
    status, printed = run(train, place, **short)
    assert status == 0 and (place / "run/model.safetensors").exists(), printed

    # There is something to protect: the model copies before it is guarded.
    status, printed = run("cpsample audit run --unguarded --test ratio", place, **short)
    before = copies_of_40(printed)
    assert status == 1 and before >= 4, printed

    # The guard, and what it lets pass.
    for line in (guard, sample):
        status, printed = run(line, place, **short)
        assert status == 0, (line, printed)
    for name in ("run/guard.safetensors", "samples.npz", "samples.png"):
        assert (place / name).exists()

    # The verdict on so short a training may be bad, but it is given; so is what an attacker learns.
    status, printed = run(audit, place, **short)
    assert status in (1, 3) and copies_of_40(printed) < before, printed
    assert (place / "audit.html").exists()
    status, printed = run(attack, place, **short)
    assert status == 0 and "attacker learn" in printed, printed


def save_pipeline(folder, images, steps=400):
    "A small DDIMPipeline that has learned these images, uint8 [N, 3, 8, 8]; it is returned, too."

    def build():
        return diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        )

    # As the training example of diffusers does it.
    network, scheduler = seeded(0, build), diffusers.DDIMScheduler()
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    x0 = pixels(images).repeat(12, 1, 1, 1)
    for _ in range(steps):
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.randint(1000, (len(x0),), generator=generator)
        answer = network(scheduler.add_noise(x0, noise, t), t).sample
        torch.nn.functional.mse_loss(answer, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()

    # Kept in the folder that the README loads it from.
    pipe = diffusers.DDIMPipeline(network.eval(), scheduler)
    pipe.save_pretrained(folder)
    return pipe


def test_a_pipeline_of_diffusers(place, monkeypatch):
    members = read_data(str(place / "my_pictures"), 8, fit="cut")
    pipe = save_pipeline(place / "my_pipeline", members)
    (generate,) = pipeline_samplers(pipe, num_inference_steps=50).values()
    assert copy_test(generate(40, 0), pixels(members)).copies >= 4

    # As it is printed; a guard of fewer steps.
    monkeypatch.chdir(place)
    monkeypatch.setitem(fit_pipeline_guard.__kwdefaults__, "steps", 300)
    names = {}
    exec(block("python", "from diffusers import"), names)
    assert names["protection"].rows_seen == 50 and names["guard"].calibrated
    assert (place / "secret/guard.safetensors").exists()
