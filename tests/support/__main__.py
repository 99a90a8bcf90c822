"""`python -m tests.support [--vllm PYTHON] [MODEL_TYPE...]`: try architectures, and keep what is found as a table.

Without names, all that have no result yet, or none of vLLM's; with `--recipes`, whether recipes take them, and nothing
else. `make support` calls it. After each architecture the
results are in `docs/measured/support.json` and shown in `docs/support.md`, so that it can be interrupted.
"""

import argparse
import subprocess
import tempfile
import warnings
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import transformers

from tests.support import recipes, table, tiny
from tests.support.check import Row, check
from tests.support.engine import distance, started

ASK_VERSION = "from importlib.metadata import version as v, packages_distributions as p; print(v(p()['vllm'][0]))"


def main() -> None:
    """Try what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="MODEL_TYPE", nargs="*")
    parser.add_argument("--vllm", metavar="PYTHON", type=Path, help="load and run the results in vLLM, too")
    parser.add_argument("--recipes", action="store_true", help="only try whether recipes take them")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    # 1) What there is already, if the same versions found it.
    rows: dict[str, Row] = {}
    versions = {name: version(name) for name in ("transformers", "torch")}
    kept = table.read() if table.RESULTS.exists() else table.Results({}, {})
    versions["vllm"] = _version(options.vllm) if options.vllm else kept.versions.get("vllm", "not run")
    if {**kept.versions, "vllm": versions["vllm"]} == versions and kept.versions["vllm"] in (
        "not run",
        versions["vllm"],
    ):
        rows |= kept.rows
    if options.recipes:
        for name in options.names or [name for name, row in rows.items() if not row.recipes]:
            with tempfile.TemporaryDirectory() as scratch:
                rows[name].recipes = recipes.calibrated(name, Path(scratch))
            table.write(table.Results(versions, rows))
            print(name, rows[name].recipes, flush=True)
        return
    # 2) The others: here, then in vLLM; its source too, where the result is not right there.
    names = options.names or [name for name in tiny.model_types() if _missing(rows.get(name), options.vllm)]
    with started(options.vllm) if options.vllm else nullcontext() as vllm:
        for name in names:
            with tempfile.TemporaryDirectory() as scratch:
                rows[name], expected = check(name, Path(scratch))
                row = rows[name]
                if vllm and expected:
                    row.vllm = vllm(Path(scratch) / "result", expected.result)
                    if row.vllm.known and not table.agrees(row.vllm):
                        row.source = vllm(Path(scratch) / "source", expected.source)
                        row.rounding = distance(expected.result, expected.source)
                row.recipes = recipes.calibrated(name, Path(scratch))
            table.write(table.Results(versions, rows))
            print(row, flush=True)


def _version(python: Path) -> str:
    """The version of vLLM in the environment of `python`."""
    return subprocess.check_output([python, "-c", ASK_VERSION], text=True).strip()


def _missing(row: Row | None, vllm: Path | None) -> bool:
    """Whether an architecture is still to be tried."""
    return row is None or (vllm is not None and not row.failed and row.vllm is None)


if __name__ == "__main__":
    main()
