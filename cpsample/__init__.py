__version__ = "0.2.0"

from typing import TYPE_CHECKING

from .front_door import PLACES, protect
from .front_door import offered as __getattr__  # noqa: F401 (names are imported when asked for)

if TYPE_CHECKING:
    from .core.calibration import calibrate
    from .core.copying import copy_test
    from .core.ddpm import generate, sample
    from .core.guard import Guard, fit_guard
    from .core.guard_files import load_guard, save_guard
    from .core.recognition import calibrate_check, recognise, unrecognised_by
    from .core.schedule import make_schedule
    from .judgement.copy_audit import audit
    from .practice.quality_measures import _CopyRate as CopyRate
    from .production.pipelines import fit_pipeline_guard

__all__ = [
    "CopyRate",
    "Guard",
    "__version__",
    "audit",
    "calibrate",
    "calibrate_check",
    "copy_test",
    "fit_guard",
    "fit_pipeline_guard",
    "generate",
    "load_guard",
    "make_schedule",
    "protect",
    "recognise",
    "sample",
    "save_guard",
    "unrecognised_by",
]


def __dir__():
    return sorted([*globals(), *PLACES])
