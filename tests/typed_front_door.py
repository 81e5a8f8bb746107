"The front door as a type checker sees it: `mypy` reads this file (make lint), nobody runs it."

from pathlib import Path
from typing import Any

from torch import Tensor

import cpsample
from cpsample.core.ddpm import Denoiser


def the_whole_method(
    model: Denoiser, members: Tensor, reference: Tensor, held_out: Tensor
) -> Tensor:
    schedule = cpsample.make_schedule("linear", 1000)
    guard: cpsample.Guard = cpsample.fit_guard(members, schedule, reference, steps=10)
    report: dict[str, Any] = cpsample.calibrate(guard, members, held_out)
    assert report["level"] < guard.t_max
    cpsample.save_guard(guard, Path("guard"))
    guard = cpsample.load_guard("guard")

    protected: Denoiser = cpsample.protect(model, guard)
    images: Tensor = cpsample.generate(protected, schedule, (1, 8, 8), 4, steps=10)
    for step in cpsample.sample(protected, schedule, (4, 1, 8, 8), steps=10):
        images = step.x0_pred
    copies: int = cpsample.copy_test(images, members).copies
    record: dict[str, Any] = cpsample.audit(images, members, held_out).record
    assert copies == record["tests"]["ratio"]["copies"]
    cpsample.CopyRate(members).update(images)
    return images


def a_pipeline(pipe: Any, members: Tensor, others: Tensor) -> cpsample.Guard:
    return cpsample.fit_pipeline_guard(pipe, members, others, "secret/guard")


def what_is_refused(model: Denoiser, guard: cpsample.Guard, x: Tensor) -> None:
    "Every line is a mistake that the checker finds: without it, the mark would be unused."
    cpsample.make_schedule(T="many")  # type: ignore[arg-type]
    cpsample.fit_guard(x)  # type: ignore[call-arg]
    cpsample.copy_test(x, "folder")  # type: ignore[arg-type]
    cpsample.load_guard(3)  # type: ignore[arg-type]
    schedule = cpsample.make_schedule()
    cpsample.generate(model, schedule, (1, 8, 8), 4, 10)  # type: ignore[call-arg]
    guard.strength  # type: ignore[attr-defined]  # noqa: B018
