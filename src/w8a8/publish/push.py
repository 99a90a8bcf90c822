"""`w8a8 push`: upload a checked checkpoint to the Hub.

The folder is checked before the Hub is asked anything: headers, index and every shard's checksum against `w8a8.json`,
or, given the source, all that `verify` checks. Then huggingface_hub uploads the files that `uploaded` knows, through
Xet where that is installed; all others are named and stay. Files that an interrupted upload had sent are on the Hub and
are not sent again.
"""

import glob
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from w8a8.checkpoint.sidecars import LeftOut
from w8a8.errors import W8A8Error
from w8a8.formats.provenance import PROVENANCE
from w8a8.publish.hub import explained, hub_api, target_id, writable
from w8a8.publish.made import Made
from w8a8.publish.uploaded import Files, sort_folder
from w8a8.terminal.wording import clean, plural, size
from w8a8.verification import run as verification

_SHOWN = 3
"""Problems that the error names."""


@dataclass(frozen=True)
class Job:
    """A folder to upload, its `files`, and the verification it must pass, None without a source."""

    made: Made
    repo: str
    public: bool
    files: Files
    against: verification.Job | None

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know of the checks."""
        if self.made.provenance.files or self.against:
            return ()
        return (f"{PROVENANCE} is an earlier version's, without checksums of small files; --source compares them",)

    @property
    def bytes_to_check(self) -> int:
        """Bytes of shards that `check` will read."""
        opened = self.against.source if self.against else self.made.checkpoint
        return sum(shard.size for shard in opened.shards)


@dataclass(frozen=True, slots=True)
class Pushed:
    """The files that were uploaded, or would be: a dry run has no `url`. `bytes` is their sum, `left` the others."""

    repo: str
    private: bool
    files: tuple[str, ...]
    left: tuple[LeftOut, ...]
    bytes: int
    url: str | None = None
    commit: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def address(self) -> dict[str, Any]:
        """Where it went, as plain JSON values."""
        return {"repo": self.repo, "private": self.private, "url": self.url, "commit": self.commit}


def prepare(out: str | Path, repo: str, *, public: bool = False, source: str | Path | None = None) -> Job:
    """Open `out`, and the `source` to verify it against if one is given, and list the files to upload to `repo`.

    Raises `UsageError` for an impossible id, what opening raises, and `PathEscapeError` for a link out of the folder.
    """
    target_id(repo, "REPO")
    made = Made.open(out)
    return Job(made, repo, public, sort_folder(made), verification.prepare(out, source) if source else None)


def check(job: Job, advance: Callable[[int], None] = lambda _: None) -> None:
    """Raise `W8A8Error` unless the folder is what `quantize` made. Reads every shard; `advance` gets the bytes done."""
    problems = [*job.made.problems(), *job.files.problems]
    if not problems and job.against:
        problems = list(verification.run(job.against, advance=advance).problems)
    elif not problems:
        problems = job.made.wrong_checksums(advance)
    refuse(job, problems)


def refuse(job: Job, problems: Sequence[str]) -> None:
    """Raise `W8A8Error` where there are `problems`."""
    if problems:
        more = f" (and {plural(len(problems) - _SHOWN, 'problem')} more)" if len(problems) > _SHOWN else ""
        raise W8A8Error(
            f"{job.made.path}: not uploaded, since it is not what `quantize` made: {'; '.join(problems[:_SHOWN])}{more}"
        )


def message(made: Made) -> str:
    """What the commit says."""
    return f"INT8 W8A8 by w8a8 {made.provenance.version}"


def planned(job: Job) -> Pushed:
    """Return what `run` would upload."""
    names, sizes = [name for name, _ in job.files.upload], [nbytes for _, nbytes in job.files.upload]
    return Pushed(job.repo, not job.public, tuple(names), job.files.left, sum(sizes))


def run(job: Job, *, notice: Callable[[str], None] = lambda _: None) -> Pushed:
    """Upload a checked folder; the repository is created if it does not exist, and files that the Hub has are not sent.

    Raises `HubError`, and `UsageError` where the repository is public and `public` was not asked for.
    """
    api = hub_api()
    with explained(job.repo):
        private = writable(api, job.repo, public=job.public, notice=notice)
        commit = api.upload_folder(
            repo_id=job.repo,
            folder_path=job.made.path,
            allow_patterns=[glob.escape(name) for name, _ in job.files.upload],
            commit_message=message(job.made),
        )
    done = planned(job)
    return replace(done, private=private, url=f"{api.endpoint}/{job.repo}", commit=commit.oid)


def show(pushed: Pushed, say: Callable[[Any], None]) -> None:
    """Print the address of the upload; after a dry run, the files it would send."""
    what = f"{plural(len(pushed.files), 'file')}, {size(pushed.bytes)}, {'private' if pushed.private else 'public'}"
    for name in () if pushed.url else pushed.files:
        say(clean(name))
    for left in pushed.left:
        say(f"[dim]not uploaded: {clean(left.name)} ({clean(left.reason)})[/dim]")
    if pushed.url:
        say(f"[bold]{clean(pushed.url)}[/bold]: {what}")
        return
    say(f"all checks passed; would go to [bold]{clean(pushed.repo)}[/bold]: {what}")
