"""`w8a8 quantize --push`: a result that goes to the Hub while it is made.

Each finished shard goes up as a large file, which nobody sees until a commit names it; one commit at the end has all
files, so the repository shows the result whole or not at all. The Hub tells large files by their SHA-256: what it has
is not sent again, whoever sent it, and a shard that left the disk needs no bytes for the commit. That part of
huggingface_hub is private; `Upload.open` looks whether it is as it was.
"""

import threading
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub import __version__ as hub_version
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info
from huggingface_hub.utils import _xet, disable_progress_bars  # type: ignore[attr-defined]

from w8a8.checkpoint.hub import HubFolder
from w8a8.checkpoint.remote import start_of, wait
from w8a8.checkpoint.session import retry_after
from w8a8.checkpoint.stream import Stopped
from w8a8.errors import HubError, UsageError, W8A8Error
from w8a8.execute.shard import ShardRecord
from w8a8.publish.card import write as card
from w8a8.publish.card.text import README
from w8a8.publish.hub import explained, hub_api, target_id, writable
from w8a8.publish.push import Pushed, message, planned, prepare, refuse
from w8a8.reading import MAX_TEXT_BYTES
from w8a8.storage.folders import remove
from w8a8.storage.writer import write_whole

T = TypeVar("T")

LISTED, TAKEN = "listed", "taken"
"""What a receipt says: the Hub's list of large files has the shard; or, through Xet, that it took it."""

BATCH = 256
"""Large files that the Hub is asked for at once."""
POLL_SECONDS = 0.2
WAITS_SECONDS = (1.0, 4.0, 16.0, 64.0)
"""How long to wait before something is tried again, where the Hub failed or could not be reached."""


class Upload:
    """A repository on the Hub as a `Delivery`."""

    def __init__(
        self, api: HfApi, repo: str, *, private: bool, departs: bool, notice: Callable[[str], None] = lambda _: None
    ) -> None:
        self._api, self._repo, self._private, self._departs, self._notice = api, repo, private, departs, notice
        self.done: Pushed | None = None

    @classmethod
    def open(
        cls,
        repo: str,
        *,
        source: str = "",
        public: bool = False,
        departs: bool = True,
        notice: Callable[[str], None] = lambda _: None,
    ) -> Self:
        """Find the repository, or create it; private unless `public`. Where shards depart, nothing stays here.

        Raises `UsageError` for an impossible id, that of the `source`, and where it is public and `public` was not
        asked for; `HubError`.
        """
        if target_id(repo, "--push").lower() == source.lower():
            raise UsageError(f"{repo}: is the source, which --push would replace; give another name")
        _check_version()
        disable_progress_bars()
        api = hub_api()
        with explained(repo):
            private = writable(api, repo, public=public, notice=notice)
        return cls(api, repo, private=private, departs=departs, notice=notice)

    @property
    def url(self) -> str:
        """The repository's address."""
        return f"{self._api.endpoint}/{self._repo}"

    @property
    def departs(self) -> bool:
        """Whether nothing stays here."""
        return self._departs

    def held(self, shards: Sequence[ShardRecord]) -> Set[str]:
        """The names of those shards that were sent to this repository, and that the Hub still has."""
        ours = {what: [s for s in shards if s.receipt == self._receipt(what)] for what in (LISTED, TAKEN)}
        with explained(self._repo):
            return self._listed(ours[LISTED]) | {shard.name for shard in ours[TAKEN]}

    def send(self, path: Path, shard: ShardRecord, stopped: Callable[[], bool]) -> str:
        """Send a shard as a large file."""
        try:
            with explained(self._repo), _heeding(stopped):
                addition = _Addition(path, shard, stopped)
                _persistently(partial(self._api.preupload_lfs_files, self._repo, [addition], num_threads=1), stopped)
                listed = self._listed([shard])
        except HubError:
            if stopped():
                raise Stopped from None
            raise
        if addition._upload_mode != "lfs" or addition._should_ignore:
            raise HubError(
                f"{self._repo}: does not keep {shard.name} as a large file; let its .gitattributes say "
                "`*.safetensors filter=lfs diff=lfs merge=lfs -text`, and its .gitignore nothing of it"
            )
        return self._receipt(LISTED if listed else TAKEN)

    def finish(self, folder: Path, shards: Sequence[ShardRecord]) -> None:
        """Commit the shards and all other files of `folder`, with a model card where one can be made."""
        with explained(self._repo):
            self._write_card(folder, _persistently(self._info))
        job = prepare(folder, self._repo)
        refuse(job, [*job.made.problems(), *job.files.problems])
        small = [name for name, _ in job.files.upload if name not in job.made.provenance.shards]
        with explained(self._repo):
            commit = _persistently(lambda: self._commit(folder, shards, small, message(job.made)))
        self.done = replace(planned(job), private=self._private, url=self.url, commit=commit)

    def _commit(self, folder: Path, shards: Sequence[ShardRecord], small: Sequence[str], summary: str) -> str:
        """Commit what the repository does not show yet; return the commit that does."""
        siblings = self._info().siblings or ()
        shown = {file.rfilename: file.lfs.sha256 for file in siblings if file.lfs}
        missing = [shard for shard in shards if shown.get(shard.name) != shard.sha256]
        if lost := sorted({shard.name for shard in missing} - self.held(missing)):
            raise HubError(
                f"{self._repo}: the Hub has lost {', '.join(lost)}; the same command makes and sends it again"
            )
        operations: list[CommitOperationAdd] = [_Addition(folder / shard.name, shard).sent() for shard in missing]
        operations += [CommitOperationAdd(name, folder / name) for name in small]
        return str(self._api.create_commit(self._repo, operations, commit_message=summary).oid)

    def _write_card(self, folder: Path, info: Any) -> None:
        """Write the card into the folder. Of one in the repository, what a person added stays; another README does."""
        there = README in {file.rfilename for file in info.siblings or ()}
        try:
            if there:
                before, _ = start_of(HubFolder(self._repo, self._repo, str(info.sha), {}), README, MAX_TEXT_BYTES)
                write_whole(folder / README, before)
            made = card.make(folder, repo=self._repo)
        except W8A8Error as error:
            remove(folder / README)
            self._notice(f"no model card was written: {str(error).replace(str(folder), self._repo)}")
            return
        if made.stranger:
            remove(folder / README)
            self._notice(f"{self._repo} has a {README} of its own, which stays")
            return
        for notice in made.notices:
            self._notice(notice)
        card.write(made)

    def _info(self) -> Any:
        return self._api.model_info(self._repo, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)

    def _listed(self, shards: Sequence[ShardRecord]) -> set[str]:
        """The names of those shards that the Hub has as large files."""
        there = set[str]()
        for begin in range(0, len(shards), BATCH):
            some = shards[begin : begin + BATCH]
            infos = [UploadInfo(size=s.size, sample=b"", sha256=bytes.fromhex(s.sha256)) for s in some]
            actions, _, _ = post_lfs_batch_info(
                infos, token=None, repo_type="model", repo_id=self._repo, revision="main", endpoint=self._api.endpoint
            )
            there |= {action["oid"] for action in actions if not action.get("actions")}
        return {shard.name for shard in shards if shard.sha256 in there}

    def _receipt(self, what: str) -> str:
        return f"{self.url} {what}"


class _Addition(CommitOperationAdd):
    """A shard in a commit. Its SHA-256 is known, and reading it ends once `stopped()` holds."""

    def __init__(self, path: Path, shard: ShardRecord, stopped: Callable[[], bool] = lambda: False) -> None:
        super().__init__(shard.name, path)
        self.upload_info.sha256 = bytes.fromhex(shard.sha256)
        self._path, self._stopped = path, stopped

    def sent(self) -> Self:
        """It as `preupload_lfs_files` leaves it, for a file that the Hub has: its bytes need not be here."""
        self._upload_mode, self._is_uploaded, self.path_or_fileobj = "lfs", True, b""
        return self

    @contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:  # noqa: ARG002 - there is no bar
        """The file."""
        with self._path.open("rb") as file:
            read = file.read

            def some(size: int | None = -1) -> bytes:
                if self._stopped():
                    raise Stopped
                return read(size)

            file.read = some  # type: ignore[method-assign]
            yield file


@contextmanager
def _heeding(stopped: Callable[[], bool]) -> Iterator[None]:
    """End what hf_xet does in this context once `stopped()` holds: by itself it would not notice."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(POLL_SECONDS):
            if stopped():
                _xet.abort_xet_session()  # type: ignore[no-untyped-call]
                return

    watcher = threading.Thread(target=watch, name="xet", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()


def _persistently(action: Callable[[], T], stopped: Callable[[], bool] = lambda: False) -> T:
    """Do what may be done again, until the Hub neither fails nor asks to wait. Raises `Stopped`, and its last error."""
    for seconds in WAITS_SECONDS:
        try:
            return action()
        except (HTTPError, RuntimeError) as error:
            cause = (
                error.__cause__ if isinstance(error, RuntimeError) else error
            )  # so huggingface_hub wraps an upload's
            response = getattr(cause, "response", None)
            status = response.status_code if response is not None else 500
            if not isinstance(cause, HTTPError) or (status < 500 and status not in (408, 429)):
                raise
            asked = retry_after(response.headers.get("Retry-After", "")) if response is not None else 0.0
            wait(max(seconds, asked), stopped)
    return action()


def _check_version() -> None:
    """Raise `W8A8Error` where what this module needs of huggingface_hub, and is private there, is not as it was."""
    private = {"_is_uploaded", "_upload_mode", "_should_ignore"}
    if not private <= {field.name for field in fields(CommitOperationAdd)} or not hasattr(_xet, "abort_xet_session"):
        raise W8A8Error(
            f"huggingface_hub {hub_version} is not known to --push: pip install 'huggingface_hub<2.5', or leave --push "
            "away, and give `w8a8 push` then"
        )
