"""Where a checkpoint comes from: its base model and the license."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w8a8.formats.provenance import PROVENANCE
from w8a8.publish.card.frontmatter import metadata_of
from w8a8.publish.card.text import README, read_text
from w8a8.publish.hub import valid_id
from w8a8.publish.made import Made
from w8a8.terminal.wording import printable

LICENSE_FILE = re.compile(r"(?i)(licen[cs]e|notice|copying|use_policy|gemma_.*terms).*")

_LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True, slots=True)
class Origin:
    """The source as the card shows it: `base` is its Hub id, None where it has none; `license` is Hub metadata.

    `name` is the Hub id or the folder's name, printable; `revision` the commit that was quantized, if it is known.
    """

    base: str | None
    name: str
    revision: str | None
    license: Mapping[str, Any]
    license_files: tuple[str, ...]
    notices: tuple[str, ...]


def find_origin(made: Made, base_model: str | None) -> Origin:
    """Find base model and license; `base_model` is the source's Hub id or folder, by default what w8a8.json says.

    Raises `UsageError` where it is neither.
    """
    source = made.provenance.source
    folder = Path(base_model) if base_model and Path(base_model).is_dir() else None
    base: str | None = None
    notices: tuple[str, ...] = ()
    if folder or not (base_model or "/" in source.name):
        where = f"{base_model} is a folder" if folder else f"made from the folder {source.name}"
        notices = (f"{where}, not a Hub id: no base_model in the card (--base-model ORG/NAME)",)
    elif base_model:
        base = valid_id(base_model, "--base-model", expected="a folder or a Hub id")
    else:
        base = valid_id(source.name, PROVENANCE)
    revision = source.revision if base == source.name else None
    license_files = tuple(name for name in made.checkpoint.sidecars if LICENSE_FILE.fullmatch(name))
    found = _license(_source_metadata(folder, base, revision), made.checkpoint.sidecars, license_files, base)
    return Origin(base, base or printable(source.name), revision, found, license_files, notices)


def _source_metadata(folder: Path | None, base: str | None, revision: str | None) -> Mapping[str, Any]:
    """The metadata of the source's README: from its folder, from the Hub's cache, or asked of the Hub once."""
    if folder:
        return metadata_of(read_text(folder / README))
    if base is None:
        return {}
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    cached = try_to_load_from_cache(base, README, revision=revision)
    if isinstance(cached, str):
        return metadata_of(read_text(Path(cached)))
    try:
        info = HfApi().model_info(base, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError):
        return {}  # the notice about the license says so
    return info.card_data.to_dict() if info.card_data else {}  # type: ignore[no-untyped-call]


def _license(
    metadata: Mapping[str, Any], sidecars: Collection[str], license_files: Sequence[str], base: str | None
) -> dict[str, Any]:
    """The license that the source's metadata name; else the first license file that came along; else nothing."""
    found = {key: metadata[key] for key in _LICENSE_KEYS if isinstance(metadata.get(key), str) and metadata[key]}
    link = found.get("license_link", "")
    if link and "://" not in link and link not in sidecars:
        found.pop("license_link")
        if base:
            found["license_link"] = f"https://huggingface.co/{base}/blob/main/{link}"
    if "license" in found:
        return found
    return {"license": "other", "license_link": license_files[0]} if license_files else {}
