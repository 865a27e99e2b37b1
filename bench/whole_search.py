"""A real search on CIFAR-10 for a few epochs, and what all of it would take.

    python -m bench.whole_search --cifar10 cifar10_jpeg.npz --device cuda
    python -m bench.whole_search --epochs 1 --epoch-steps 2 --channels 4 --layers 3   # digits

The settings are the published ones (second order, batch 64, 16 channels, 8 cells), with lambda_max
at the end of every second epoch. The time of the whole is extrapolated, and labelled so: an epoch
counts as the last one took, lambda_max as its last measurement.

--cifar10 names an archive of JPEG files: `jpeg`, all files as one array of bytes, `offset`, where
each begins (and the last ends), its `label` and whether it `is_test`. Without it the images are
scikit-learn's digits, enlarged to 32x32.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.record import line
from rdarts_fast.errors import UserError, exit_on_user_error
from rdarts_fast.run_dir import Run
from rdarts_fast.search import run_search
from rdarts_fast.training import select_device

EPOCHS = 50  # published
CURVATURE_EVERY = 2


def unpack(archive: Path, target: Path, per_class: int | None = None) -> None:
    """Write the archive's images as `--data npz:` wants them. per_class: at most, in each part.

    Raises UserError where the archive is not there or is none.
    """
    try:
        with np.load(archive) as stored:
            jpeg, offset = stored["jpeg"].tobytes(), stored["offset"]
            label, is_test = stored["label"].astype(np.int64), stored["is_test"].astype(bool)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--cifar10 {archive}: not such an archive ({error})") from error
    arrays = {}
    for part, wanted in (("train", ~is_test), ("test", is_test)):
        rows = np.flatnonzero(wanted)
        if per_class is not None:
            firsts = [rows[label[rows] == c][:per_class] for c in np.unique(label)]
            rows = np.sort(np.concatenate(firsts))
        files = [jpeg[offset[i] : offset[i + 1]] for i in rows]
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # decoding lets go of the GIL
            arrays[f"x_{part}"] = np.stack(list(threads.map(decoded, files)))
        arrays[f"y_{part}"] = label[rows]
    np.savez(target, **arrays)


def decoded(file: bytes) -> np.ndarray[Any, Any]:
    """Return a JPEG file's pixels, uint8 [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def extrapolated(records: list[dict[str, Any]], epochs: int = EPOCHS) -> float:
    """Return the seconds that `epochs` epochs take, given the records of the first ones."""
    measured = [record.get("curvature_seconds", 0.0) for record in records]
    apart = records[-1]["seconds"] - measured[-1]
    lambdas = [seconds for seconds in measured if seconds > 0.0]
    due = len({*range(0, epochs, CURVATURE_EVERY), epochs - 1})
    return float(epochs * apart + (due * lambdas[-1] if lambdas else 0.0))


@exit_on_user_error
def main() -> None:
    """Search and print a line."""
    parsed = _parse()
    device = select_device(parsed.device)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        data, words = "digits", "digits"
        started = time.perf_counter()
        if parsed.cifar10 is not None:
            images = Path(folder) / "cifar10.npz"
            unpack(parsed.cifar10, images, parsed.per_class)
            data, words = f"npz:{images}", "CIFAR-10 (JPEG)"
        unpacked = time.perf_counter()
        run = run_search(**_settings(parsed, data, Path(folder) / "run"))
        found = _result(run, parsed)
        found |= {"data": words, "unpack_seconds": round(unpacked - started, 1)}
        found["whole_seconds"] = round(time.perf_counter() - unpacked, 1)
    print(line("whole_search", device, **found))


def _settings(parsed: argparse.Namespace, data: str, out: Path) -> dict[str, Any]:
    asked: dict[str, Any] = {"space": parsed.space, "data": data, "preset": "paper", "out": out}
    asked |= {"epochs": parsed.epochs, "device": parsed.device, "curvature": "lambda"}
    asked |= {"curvature_every": CURVATURE_EVERY, "image_size": 32}
    more = ("epoch_steps", "channels", "layers", "batch_size")
    return asked | {name: value for name in more if (value := getattr(parsed, name)) is not None}


def _result(run: Run, parsed: argparse.Namespace) -> dict[str, Any]:
    records = run.metrics
    steps = "all" if parsed.epoch_steps is None else parsed.epoch_steps
    return {
        "space": parsed.space,
        "epochs": len(records),
        "epoch_steps": steps,
        "channels": run.config["channels"],
        "layers": run.config["layers"],
        "batch": run.config["batch_size"],
        "epoch_seconds": [record["seconds"] for record in records],
        "curvature_seconds": [record.get("curvature_seconds") for record in records],
        "lambda_max": [record.get("lambda_max") for record in records],
        "valid_accuracy": [record["valid_accuracy"] for record in records],
        f"extrapolated_{EPOCHS}_epochs_seconds": round(extrapolated(records), 1),
        "note": f"{EPOCHS} epochs extrapolated from {len(records)}, not run",
        "genotype": records[-1]["genotype"],
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.whole_search",
        description="Search on CIFAR-10 for a few epochs and extrapolate to all of them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--cifar10", type=Path, help="an archive of JPEG files [digits]")
    parser.add_argument("--per-class", type=int, help="images of each class and part [all]")
    parser.add_argument("--space", default="s4", help="search space")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--epoch-steps", type=int, help="batches an epoch [all]")
    parser.add_argument("--channels", type=int, help="[16]")
    parser.add_argument("--layers", type=int, help="[8]")
    parser.add_argument("--batch-size", type=int, help="[64]")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    return parser.parse_args()


if __name__ == "__main__":
    main()
