"Make the weights that ship in data/weights again: python tools/weights.py"
import json
import time
from pathlib import Path

from safetensors.torch import save_file

from cpsample.data import atomic, load_digits, save_json
from cpsample.demo import provenance
from cpsample.memorization import fit_encoder

folder = Path(__file__).resolve().parent.parent / "data" / "weights"


def digits_encoder(seed=0):
    "The feature space `digits-mlp-64` of the Fréchet distances on digits."
    start, (x, y) = time.perf_counter(), load_digits()
    encoder = fit_encoder(x, y, seed=seed)
    accuracy = (encoder(x).argmax(1) == y).float().mean().item()
    with atomic(folder / "digits_encoder.safetensors") as tmp:
        save_file(encoder.state_dict(), tmp)
    save_json(folder / "digits_encoder.json", {"name": "digits-mlp-64", "command": "python tools/weights.py", **provenance(), "seed": seed,
        "data": "all 1,797 digits of scikit-learn", "train_accuracy": accuracy, "wall_seconds": round(time.perf_counter() - start, 1)})


if __name__ == "__main__":
    digits_encoder()
    print(json.dumps(json.loads((folder / "digits_encoder.json").read_text()), indent=1))
