"""The fingerprint of the native sources, compiled into the extension and compared at import."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

SUFFIXES = (".cpp", ".cu", ".h")


def csrc_hash(folder: Path) -> str:
    """Return the sha256 over the sorted relative paths and contents of the sources in `folder`."""
    digest = hashlib.sha256()
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.suffix in SUFFIXES}
    for name in sorted(files):
        content = files[name].read_bytes()
        digest.update(f"{name}\n{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


if __name__ == "__main__":
    print(csrc_hash(Path(sys.argv[1])))
