"""lm-evaluation-harness's tasks: found by name, and loaded with their data, within what this command does."""

import difflib
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w8a8.checkpoint import resolve
from w8a8.checkpoint.source import cached, hub_id
from w8a8.errors import HubError, MissingExtraError, UsageError, W8A8Error, first_line

try:
    import datasets
    import lm_eval.api.task
    from lm_eval.tasks import TaskManager
    from tqdm import tqdm
except ImportError as missing:
    raise MissingExtraError(f"eval lm needs lm-evaluation-harness ({missing}): pip install 'w8a8[lm]'") from missing

FEWSHOT_SEED = 1234
"""The harness's seed for choosing examples."""

SCORED = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")
"""Kinds of tasks that score texts and so need a tokenizer; `generate_until` compares answers."""


@dataclass(frozen=True, slots=True)
class Tasks:
    """The harness's tasks by name, its groups by name, and the rows of a table: a group's tasks, or one task."""

    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]
    rows: Mapping[str, tuple[str, ...]]

    @property
    def scored(self) -> list[str]:
        """The tasks that score texts."""
        return [name for name, task in self.tasks.items() if task.OUTPUT_TYPE in SCORED]


def load(
    names: Sequence[str],
    *,
    include: Path | None = None,
    shots: int | None = None,
    notice: Callable[[str], None] = lambda _: None,
) -> Tasks:
    """Load tasks, groups and tags of the harness, or of YAML files in the folder `include`, and their data.

    `shots` is the number of examples to show, where a task does not fix it at 0; None: the task's own.

    Raises UsageError for an unknown name or a task that this command does not run, HubError where its data cannot be
    had, MissingExtraError where it needs a package more.
    """
    if include is not None and not include.is_dir():
        raise UsageError(f"--include-path {include}: not a folder; it holds tasks as YAML files")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)  # there is one live line, ours
    manager = _manager(names, include)
    tasks, groups, rows = dict[str, Any](), dict[str, Any](), dict[str, tuple[str, ...]]()
    for name in names:
        notice(f"loading {name}")
        found = _load(manager, name)
        if twice := tasks.keys() & found["tasks"].keys():
            raise UsageError(f"{min(twice)} is asked for twice, the second time by {name}; name it once")
        tasks |= found["tasks"]
        if name in found["groups"] and found["groups"][name].has_aggregation:
            groups |= found["groups"]
            rows[name] = tuple(found["tasks"])
        else:
            rows |= {task: (task,) for task in found["tasks"]}
    for name, task in tasks.items():
        _check(name, task)
        own = task.get_config("num_fewshot")
        if own is None or (shots is not None and own != 0):
            task.set_config(key="num_fewshot", value=shots or 0)
        elif shots:
            notice(f"{name} is asked without examples: it fixes their number at 0")
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return Tasks(tasks, groups, rows)


def _manager(names: Sequence[str], include: Path | None) -> Any:
    """Index the folder `include` and, unless it has all `names`, the harness's 14,000 files. Raises UsageError."""
    own = None if include is None else str(include)
    if own is not None and _complete(manager := TaskManager(include_path=own, include_defaults=False), names):
        return manager
    manager = TaskManager(include_path=own)
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            known = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists the harness's"
            raise UsageError(f"{name}: the harness has no such task; {known}; --include-path adds a folder of yours")
    return manager


def _complete(manager: Any, names: Sequence[Any]) -> bool:
    """Whether an index has all `names`: tasks, and groups of tasks that it has."""
    entries = [manager.task_index.get(name) if isinstance(name, str) else None for name in names]
    return all(
        entry is not None
        and (entry.name in manager.all_subtasks or (entry.cfg and _complete(manager, entry.cfg.get("task", [None]))))
        for entry in entries
    )


def _load(manager: Any, name: str) -> Any:
    try:
        return manager.load([name])
    except W8A8Error:
        raise
    except ImportError as error:
        raise MissingExtraError(
            f"{name}: {first_line(error)}; install what the task needs (lm-eval's extras)"
        ) from error
    except Exception as error:  # a task is a program, and its data come through several libraries
        raise HubError(
            f"{name}: its data cannot be had ({first_line(error)}); the harness's tasks have them on the Hub, and "
            "--include-path takes tasks whose data are files"
        ) from error


def _check(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(f"{name}: it runs programs that the model writes, which this command does not; use lm_eval")
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"{name}: it shows images, which this command does not; use lm_eval")


def tokenizer_of(checkpoint: str | None) -> Any:
    """Load the tokenizer of a folder or a Hub id; None for none. Raises what opening and loading a checkpoint raise."""
    if checkpoint is None:
        return None
    from w8a8.runtime.loading import load_tokenizer

    folder = Path(checkpoint)
    if not folder.is_dir():
        repo, revision = hub_id(checkpoint)
        here = cached(repo, revision)
        if here is not None and (here / "tokenizer_config.json").is_file():
            folder = here
        else:  # transformers fetches the tokenizer alone, by the id
            folder = resolve(checkpoint).path if revision else Path(repo)
    return load_tokenizer(checkpoint, folder)
