"""A retrained network as one file that runs without this package: torch.export's or ONNX.

python -m rdarts_fast.export runs/retrain-first --out model.onnx

The file takes normalised images, as the network does; the mean and standard deviation are printed
and stand in the file's metadata. onnx, onnxscript and onnxruntime (the extra `export`) are imported
when an ONNX file is written.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from rdarts_fast import config_sources
from rdarts_fast.config import RetrainConfig
from rdarts_fast.draws import Draws
from rdarts_fast.errors import UserError, exit_on_user_error
from rdarts_fast.genotype import Genotype
from rdarts_fast.networks import Network
from rdarts_fast.run_dir import Run
from rdarts_fast.tasks.classification import Classification

# How far the file's logits may be from the network's, relative to the largest: float32, where sums
# are taken in another order and batch norms are folded into convolutions.
TOLERANCE = 2e-5


class _Fixed(nn.Module):
    """A network without noise as a function of the images alone."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images, Draws(0))  # nothing draws in eval mode
        return logits


def export_network(
    network: Network,
    path: Path,
    image_size: tuple[int, int],
    notes: Mapping[str, str] | None = None,
) -> float:
    """Write `network`, as it is in eval mode, to `path` (.pt2 or .onnx), and return the largest
    difference between what that file computes and what the network does.

    The file's function takes `images`, float32 [batch, C, *image_size] of any batch, to logits
    [batch, classes]. notes: texts for its metadata (ONNX's metadata_props, torch.export's
    extra_files). The file is run before it gets its name. Raises UserError for a genotype with
    noise, another suffix, a missing extra, a place that cannot be written; RuntimeError where file
    and network differ by more than TOLERANCE of the largest logit.
    """
    _check(network.genotype, path)
    evaluated = copy.deepcopy(network).cpu().to(memory_format=torch.contiguous_format).eval()
    evaluated.auxiliary = None  # in train mode only
    fixed = _Fixed(evaluated).requires_grad_(False)
    shape = (next(network.stem.parameters()).shape[1], *image_size)  # of [3C, C, 3, 3]
    program = _trace(fixed, shape)
    to_bytes, load = _FORMATS[path.suffix]
    data = to_bytes(program, notes or {})
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".unfinished-") as folder:
            written = Path(folder) / path.name
            written.write_bytes(data)
            difference = _largest_difference(fixed, load(written), shape)
            os.replace(written, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return difference


def export_run(
    folder: Path, path: Path, checkpoint: str = "last", data_root: Path | None = None
) -> None:
    """Write the network of the retraining in `folder` to `path` and print what the file takes.

    checkpoint: "last", or "best" by the error. data_root: where the data set lies by now; its
    images are read for their size, mean and standard deviation. Raises what export_network raises,
    and UserError where `folder` holds no retraining, or the images are not those that it saw.
    """
    run = Run.read(folder)
    if "source" not in run.config or run.genotype is None:
        hint = f"python -m rdarts_fast.retrain {folder}"
        raise UserError(f"{folder} is not a retraining's folder; {hint} makes one of a search")
    _check(run.genotype, path)
    settings = config_sources.stored(RetrainConfig, folder, "RUN")
    if data_root is not None:
        settings = replace(settings, data_root=data_root.absolute())
    if settings.task != "classification":
        raise UserError(f"{folder}: a network for {settings.task}; only classifiers are exported")
    task = Classification.load(settings, torch.device("cpu"))
    if task.fingerprint() != run.environment["data"]:
        raise UserError(
            f"the images of {settings.data} are no longer those that {folder} was trained on: mean "
            "and deviation would be others"
        )
    stored = run.load_checkpoint(checkpoint)
    network = task.network(settings, run.genotype)
    network.load_state_dict(stored["network"])
    images = task.images
    mean, std = images.augmentation.mean, images.augmentation.std
    notes = {
        "input": "(grey level / 255 - mean) / std",
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        "class_names": json.dumps(images.class_names),
        "genotype": run.genotype.to_json(),
    }
    difference = export_network(network, path, images.size, notes)
    height, width = images.size
    print(
        f"{path}: checkpoint {checkpoint} of {folder}, after {stored['epoch']} of "
        f"{settings.epochs} epochs\n"
        f"images float32 [batch, {images.channels}, {height}, {width}] -> logits [batch, "
        f"{images.classes}]; the file's differ from the network's by at most {difference:.1e}\n"
        f"images go in as {notes['input']}, mean {_numbers(mean)}, std {_numbers(std)} "
        "(in the file's metadata)"
    )


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.8g}" for value in values)


def _check(genotype: Genotype, path: Path) -> None:
    """Raise UserError where the network has no file, or `path` cannot be one."""
    if any(name == "noise" for kind in genotype.cells for _, _, name in genotype.edges(kind)):
        raise UserError(
            "the genotype has the operation noise, whose output is random in eval mode too: there "
            "is no fixed network to export"
        )
    if path.suffix not in _FORMATS:
        raise UserError(f"--out {path}: expected a name that ends in {' or '.join(_FORMATS)}")
    if path.suffix == ".onnx":
        _check_onnx()
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: {path.parent} is not a folder")


def _check_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"a file in .onnx needs the extra: pip install '.[export]' ({error})"
        ) from error


def _trace(fixed: _Fixed, shape: tuple[int, ...]) -> ExportedProgram:
    """Return the graph for images [any batch, *shape]."""
    images = torch.zeros(2, *shape)  # a batch of 1 could be taken for a constant
    batch = {"images": {0: Dim("batch")}}
    program = torch.export.export(fixed, (images,), dynamic_shapes=batch)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it would put this machine's paths into the file
    return program


def _pt2_bytes(program: ExportedProgram, notes: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=dict(notes))
    return buffer.getvalue()


def _load_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()


def _onnx_bytes(program: ExportedProgram, notes: Mapping[str, str]) -> bytes:
    exported = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=["images"], output_names=["logits"]
    )
    assert exported is not None  # with dynamo it is the program
    exported.model.metadata_props.update(notes)
    data: bytes = exported.model_proto.SerializeToString()
    return data


def _load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


# suffix -> (the file's bytes, the written file as a function)
_FORMATS: Mapping[
    str,
    tuple[
        Callable[[ExportedProgram, Mapping[str, str]], bytes],
        Callable[[Path], Callable[[Tensor], Tensor]],
    ],
] = {".pt2": (_pt2_bytes, _load_pt2), ".onnx": (_onnx_bytes, _load_onnx)}


@torch.no_grad()
def _largest_difference(
    fixed: _Fixed, written: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> float:
    """Return how far both are apart on two random batches. Raises RuntimeError where too far."""
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch in (1, 3):  # neither is the batch of the trace
        images = torch.randn(batch, *shape, generator=generator)
        expected, got = fixed(images), written(images)
        difference = float((got - expected).abs().max())
        size = float(expected.abs().max())
        if not difference <= TOLERANCE * (1e-3 + size):
            raise RuntimeError(
                f"the exported file's logits differ from the network's by {difference:.2e}, where "
                f"the largest is {size:.2e}: no file was written"
            )
        largest = max(largest, difference)
    return largest


@exit_on_user_error
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rdarts_fast.export",
        description="Write a retrained network as one file that runs without this package, and "
        "check the file against the network.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a retraining's folder")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="the file: .pt2 for torch.export.load, .onnx for ONNX (needs the extra `export`)",
    )
    parser.add_argument(
        "--checkpoint",
        choices=("last", "best"),
        default="last",
        help="the weights after the last epoch, as published, or those of the least error",
    )
    parser.add_argument(
        "--data-root", type=Path, help="where downloaded data sets lie [where the run had them]"
    )
    given = parser.parse_args()
    export_run(given.run, given.out, given.checkpoint, given.data_root)


if __name__ == "__main__":
    main()
