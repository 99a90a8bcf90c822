"""`python -m tests.support [--vllm PYTHON] [MODEL_TYPE...]`: try architectures, and keep what is found as a table.

Without names, all that have no result yet, or none of vLLM's. `make support` calls it. After each architecture the
results are in `docs/measured/support.json` and shown in `docs/support.md`, so that it can be interrupted.
"""

import argparse
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import transformers

from tests.support import table, tiny
from tests.support.check import PROMPTS, Row, Scores, check, reason
from tests.support.engine import answers, difference

BATCH = 12
"""Architectures to a process of vLLM's."""
ASK_VERSION = "from importlib.metadata import version as v, packages_distributions as p; print(v(p()['vllm'][0]))"


def main() -> None:
    """Try what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="MODEL_TYPE", nargs="*")
    parser.add_argument("--vllm", metavar="PYTHON", type=Path, help="load and run the results in vLLM, too")
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
    # 2) The others, a batch at a time: here, then all of them in vLLM.
    names = options.names or [name for name in tiny.model_types() if _missing(rows.get(name), options.vllm)]
    for start in range(0, len(names), BATCH):
        with tempfile.TemporaryDirectory() as scratch:
            expected: dict[Path, tuple[str, Scores]] = {}
            for name in names[start : start + BATCH]:
                rows[name], reference = check(name, Path(scratch) / name)
                shutil.rmtree(Path(scratch) / name / "source", ignore_errors=True)
                if reference:
                    expected[Path(scratch) / name / "result"] = name, reference
                _keep(versions, rows, name)
            if options.vllm:
                for folder, answer in answers(options.vllm, [*expected], PROMPTS):
                    name, exact = expected[folder]
                    row = rows[name]
                    row.vllm, row.vllm_dtype = difference(answer, exact), answer.dtype
                    row.vllm_failed = reason(answer.error, folder) if answer.error else None
                    _keep(versions, rows, name)


def _version(python: Path) -> str:
    """The version of vLLM in the environment of `python`."""
    return subprocess.check_output([python, "-c", ASK_VERSION], text=True).strip()


def _missing(row: Row | None, vllm: Path | None) -> bool:
    """Whether an architecture is still to be tried."""
    return row is None or (vllm is not None and not row.failed and row.vllm is None and row.vllm_failed is None)


def _keep(versions: Mapping[str, str], rows: Mapping[str, Row], name: str) -> None:
    """Keep all results, and print one."""
    table.write(table.Results(versions, rows))
    row = rows[name]
    print(f"{name}: INT8 {row.share}, runtime {row.runtime}, vLLM {row.vllm}", row.failed, row.vllm_failed, flush=True)


if __name__ == "__main__":
    main()
