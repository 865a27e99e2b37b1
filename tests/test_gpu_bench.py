"""What the run-book's own benchmarks make of what they read: profiles, archives, a few epochs."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import slowest, whole_search
from rdarts_fast import data
from rdarts_fast.errors import UserError

NCU = """epoch 0
==PROF== Connected to process 7
"ID","Kernel Name","gpu__time_duration.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed",\
"sm__throughput.avg.pct_of_peak_sustained_elapsed"
"","","ns","%","%"
"0","void rdarts::(anonymous namespace)::sep_stage_kernel<float, 3>(T1)","1,234.5","61.2","30"
"1","normalize_kernel(Normalization)","20","1","2"
"""


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("void rdarts::(anonymous namespace)::sep_stage_kernel<float, 3>(T1)", "sep_stage_kernel"),
        ("void at::native::vectorized_elementwise_kernel<4>(int)", "vectorized_elementwise_kernel"),
        ("normalize_kernel(rdarts::Normalization)", "normalize_kernel"),
        ("sm80_xmma_gemm", "sm80_xmma_gemm"),
    ],
)
def test_a_kernels_base_name(kernel: str, expected: str) -> None:
    assert slowest.base_name(kernel) == expected


def test_launches_are_read_from_what_ncu_prints() -> None:
    first, second = slowest.table_of(NCU)
    assert first == {
        "kernel": "sep_stage_kernel",
        "ns": 1234.5,
        "percent of bandwidth": 61.2,
        "percent of arithmetic": 30.0,
    }
    assert second["kernel"] == "normalize_kernel"
    assert list(slowest.table_of("==ERROR== no permission\n")) == []


def test_a_whole_search_is_epochs_and_every_second_lambda_max() -> None:
    records = [{"seconds": 9.0, "curvature_seconds": 2.0}, {"seconds": 5.0}]
    assert whole_search.extrapolated(records[1:], 10) == 50.0
    # Of 10 epochs 0, 2, 4, 6, 8 and the last have a measurement.
    assert whole_search.extrapolated(records, 10) == 10 * 5.0 + 6 * 2.0
    records[1]["curvature_seconds"] = 1.5
    assert whole_search.extrapolated(records, 10) == 10 * 3.5 + 6 * 1.5


def archive(path: Path, colours: list[tuple[int, int, int]]) -> Path:
    """An archive of plain images: each colour once in class 0 and once in 1, for either part."""
    files = []
    for colour in colours:
        stream = io.BytesIO()
        Image.new("RGB", (8, 8), colour).save(stream, "JPEG", quality=95)
        files += 4 * [stream.getvalue()]
    count = len(files)
    np.savez(
        path,
        jpeg=np.frombuffer(b"".join(files), np.uint8),
        offset=np.cumsum([0, *map(len, files)]),
        label=np.arange(count) % 2,
        is_test=np.arange(count) % 4 >= 2,
    )
    return path


def test_an_archive_of_jpeg_files_becomes_a_data_set(tmp_path: Path) -> None:
    colours = [(200, 30, 40), (10, 20, 220), (90, 90, 90)]
    stored = archive(tmp_path / "jpeg.npz", colours)
    for per_class, kept in ((None, 3), (2, 2)):
        whole_search.unpack(stored, tmp_path / "images.npz", per_class)
        images = data.load(f"npz:{tmp_path / 'images.npz'}", root=tmp_path)
        assert images.train_labels.tolist() == images.test_labels.tolist() == kept * [0, 1]
        for i, colour in enumerate(colours[:kept]):
            found = images.train_images[2 * i].float().mean(dim=(1, 2))
            assert found.tolist() == pytest.approx(colour, abs=3)


def test_what_is_no_archive_is_told(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("words")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    for name in ("nowhere", "words", "other.npz"):
        with pytest.raises(UserError, match=f"--cifar10 .*{name}: not such an archive"):
            whole_search.unpack(tmp_path / name, tmp_path / "images.npz")
