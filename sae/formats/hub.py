"""Folders of coders on the Hub."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from ..flag_checks import UsageError
from .sparsify import check_name, newest_coders


def coders_folder(name: str | Path, local: bool | None = None, pattern: str | None = None) -> Path:
    """The folder of the coders of a folder, a run or a Hub repository.

    `local` forces (True) or forbids (False) reading `name` as a folder. Of a repository only the
    coders that the glob `pattern` matches are downloaded.
    """
    if local or (local is None and Path(name).is_dir()):
        return newest_coders(Path(name))
    return _snapshot(str(name), None if pattern is None else f"{pattern}/*")


def coder_folder(name: str, hookpoint: str | None = None) -> Path:
    """The folder of one coder of a Hub repository, downloaded; its only one without a name."""
    check_name(hookpoint or "")
    root = _snapshot(name, None if hookpoint is None else f"{hookpoint}/*")
    folder = root if hookpoint is None else root / hookpoint
    if not (folder / "cfg.json").is_file():
        what = "is not one coder" if hookpoint is None else f"has no coder at hookpoint {hookpoint}"
        raise UsageError(f"{name} {what}: name one of its folders as the hookpoint")
    return folder


def _snapshot(name: str, allow: str | None) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=allow))
    except (RepositoryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{name} is neither a folder here nor on the Hub ({reason})") from None
