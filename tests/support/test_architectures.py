"""Every architecture of transformers is quantized, verified and run as the support table says, or better."""

import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import table, tiny
from tests.support.check import check
from tests.support.recipes import YES
from w8a8.checkpoint import Checkpoint
from w8a8.plan.architectures import architecture_of
from w8a8.plan.viewing import view_of
from w8a8.sources.experts import join

KEPT = table.read()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder, removed after the test: there are hundreds."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_the_page_shows_the_results() -> None:
    assert table.page(KEPT) == table.PAGE.read_text()


def test_the_table_has_every_architecture() -> None:
    assert sorted(KEPT.rows) == sorted(tiny.model_types())


@pytest.mark.slow
@pytest.mark.parametrize("model_type", tiny.model_types())
def test_an_architecture_is_what_the_table_says_or_better(model_type: str, folder: Path) -> None:
    kept = KEPT.rows[model_type]
    found, _ = check(model_type, folder)
    assert (found.share or 0) >= (kept.share or 0) - 1e-6
    assert found.verified >= kept.verified
    assert found.runtime is not None or kept.runtime is None, found.failed
    if table.right(kept):
        assert table.right(found), found
    if (folder / "source").is_dir():  # `convert` to BF16 joins what transformers saves joined, and nothing else
        seen = view_of(Checkpoint.open(folder / "source"))
        joined = join(seen, architecture_of(seen.config).saved)
        names = {each.name for shard in joined.shards for each in shard.joined}
        assert names == {stack.name for stack in seen.stacks.values()}


def test_what_is_not_whole_says_why() -> None:
    part = [row for row in KEPT.rows.values() if not table.right(row)]
    assert len(KEPT.rows) - len(part) >= 160
    assert [
        row.model_type for row in part if row.verified and row.share == 1 and not (row.failed or row.warnings)
    ] == []


def test_what_is_neither_whole_nor_left_for_a_reason_is_refused_with_one() -> None:
    refused = {
        row.model_type: row.failed or "" for row in KEPT.rows.values() if not (table.right(row) or table.explained(row))
    }
    assert len(refused) <= 6
    for model_type, failed in refused.items():
        assert re.match(r"plan: NothingToQuantizeError: .*since|run: UnsupportedSchemeError: ", failed), model_type


def test_vllm_is_wrong_with_no_result_alone() -> None:
    verdicts = Counter(map(table.in_vllm, KEPT.rows.values()))
    assert [row.model_type for row in KEPT.rows.values() if not row.failed and not row.vllm] == []
    assert verdicts[table.Verdict.OURS] == 0
    assert verdicts[table.Verdict.RIGHT] >= 125


def test_recipes_take_most_and_refuse_the_rest_with_a_reason() -> None:
    tried = {row.model_type: row.recipes for row in KEPT.rows.values() if row.recipes}
    refused = {model_type: said for model_type, said in tried.items() if said != YES}
    assert len(tried) - len(refused) >= 75
    for model_type, said in refused.items():
        assert not re.match(r"\w+(Error|Exception): ", said), f"{model_type}: {said}"
