"""PFM files: right in every form, or an error that says what is wrong."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rdarts_fast.data.pfm import read_pfm
from rdarts_fast.errors import UserError

ROWS = [[1.0, -2.5, 3e-8], [np.inf, 0.0, 7.25]]  # top row first


def pfm(header: bytes, order: str, rows=ROWS) -> bytes:
    """Rows go from the bottom up."""
    values = [value for row in reversed(rows) for value in np.ravel(row)]
    return header + struct.pack(f"{order}{len(values)}f", *values)


def read(folder: Path, content: bytes) -> np.ndarray:
    file = folder / "x.pfm"
    file.write_bytes(content)
    return read_pfm(file)


@pytest.mark.parametrize(
    "header, order",
    [
        (b"Pf\n3 2\n-1.0\n", "<"),
        (b"Pf\n3 2\n1.0\n", ">"),
        (b"Pf\n3 2\n-0.003922\n", "<"),  # Middlebury's: the scale's size says nothing
        (b"Pf\n3 2\n255\n", ">"),
        (b"Pf\n3\n2\n-1\n", "<"),
        (b"Pf 3 2 -1e0 ", "<"),
        (b"Pf\r\n3 2\r\n-1.0\r\n", "<"),
    ],
)
def test_grey_in_both_byte_orders(tmp_path: Path, header: bytes, order: str) -> None:
    found = read(tmp_path, pfm(header, order))
    assert found.dtype == np.float32 and found.flags["C_CONTIGUOUS"]
    assert np.array_equal(found, np.array(ROWS, np.float32))


@pytest.mark.parametrize("scale, order", [(b"-1", "<"), (b"1", ">")])
def test_colour(tmp_path: Path, scale: bytes, order: str) -> None:
    rows = np.arange(18, dtype=np.float32).reshape(2, 3, 3)
    found = read(tmp_path, pfm(b"PF\n3 2\n" + scale + b"\n", order, rows))
    assert np.array_equal(found, rows)


def test_bytes_that_look_like_the_end_of_a_line_are_values(tmp_path: Path) -> None:
    for end in (b"\n", b"\r", b"\r\n"):
        content = b"Pf\n1 1\n-1" + end + b"\n\r\n\x20"
        assert read(tmp_path, content)[0, 0] == struct.unpack("<f", b"\n\r\n\x20")[0]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not a PFM file"),
        (b"P5\n3 2\n255\n" + bytes(6), "not a PFM file: expected Pf or PF"),
        (b"\x89PNG\r\n\x1a\n", "not a PFM file"),
        (b"pf\n3 2\n-1\n" + bytes(24), "not a PFM file"),
        (b"Pf\n3\n-1\n" + bytes(24), "not a PFM file"),
        (b"Pf\n-3 2\n-1\n" + bytes(24), "not a PFM file"),
        (b"Pf\n3.0 2\n-1\n" + bytes(24), "not a PFM file"),
        (b"Pf\n3 2\nlittle\n" + bytes(24), "not a PFM file"),
        (b"Pf\n3 2\n-1", "not a PFM file"),
        (b"Pf\n3 2\n0.0\n" + bytes(24), "scale: expected a number other than 0, found 0.0"),
        (b"Pf\n3 2\n--1\n" + bytes(24), "scale: expected a number"),
        (b"Pf\n3 2\n1e999\n" + bytes(24), "scale: expected a number"),
        (b"Pf\n0 2\n-1\n", "expected a pixel or more, the header says 0x2"),
        (b"Pf\n3 2\n-1\n" + bytes(23), r"expected 24 bytes .* \(3x2, 1 channel\), found 23"),
        (b"Pf\n3 2\n-1\n" + bytes(25), "expected 24 bytes .* found 25: cut off or damaged"),
        (b"PF\n3 2\n-1\n" + bytes(24), r"expected 72 bytes .* 3 channels\), found 24"),
        (b"Pf\n999999999 999999999\n-1\n" + bytes(24), "found 24: cut off"),
    ],
)
def test_anything_else_is_an_error_that_names_the_file(
    tmp_path: Path, content: bytes, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, content)
    assert "x.pfm" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.pfm: cannot be read"):
        read_pfm(tmp_path / "gone.pfm")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_file_never_gives_another_size(tmp_path_factory, data) -> None:
    content = bytearray(pfm(b"Pf\n3 2\n-1.0\n", "<"))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[at] = data.draw(st.integers(0, 255))
        else:
            del content[at:]
            break
    try:
        found = read(tmp_path_factory.getbasetemp(), bytes(content))
    except UserError:
        return
    assert found.size in (6, 2) and found.dtype == np.float32
