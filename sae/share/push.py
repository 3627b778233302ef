"""A run's coders on the Hub, with their figures, the features page and a model card.

python -m sae push checkpoints/RUN org/name --private
python -m sae push checkpoints/RUN org/name --as sae_lens --dry_run FOLDER
"""

import json
import re
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from httpx import HTTPError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from tyro.conf import Positional, arg

from ..config import (
    DataConfig,
    MachineConfig,
    ModelConfig,
    RunConfig,
    SparseCoderConfig,
    TrainingConfig,
)
from ..flag_checks import UsageError, flags_of
from ..formats import kinds
from ..formats.coder_file import CoderFile
from ..formats.hub import patiently, response_of
from ..formats.origin import without_folder
from ..formats.pieces import Stored
from ..formats.sparsify import copy_whole, newest_coders, read_config
from ..judge.compare import figures_of, summary_of
from ..runs.json_files import read_json, write_json
from ..runs.provenance import flags_of_run
from .card import card
from .export import ExportConfig, Program, export_as_can_be

_PAGE = "report.html"


@dataclass(frozen=True)
class PushConfig:
    """What to upload, and where."""

    run: Annotated[str, Positional, arg(metavar="RUN")]
    """Folder of a finished run."""
    repo: Annotated[str, Positional, arg(metavar="ORG/NAME")]
    """Repository on the Hub; it is made if it is not there."""
    private: bool = False
    """Make the repository private, if it is new."""
    formats: Annotated[tuple[Program, ...], arg(name="as")] = ()
    """Other programs' files to put beside, each in a folder of the program's name."""
    license: str | None = None
    """Licence that the card names, as the Hub abbreviates it: mit, apache-2.0."""
    revision: str = "main"
    """Branch to upload to."""
    dry_run: str | None = None
    """Folder to write what would be uploaded into, instead of uploading it."""
    hf_token: str | None = field(default=None, repr=False)
    """Hub token; HF_TOKEN in the environment and a saved login work too."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo):
            raise UsageError(f"ORG/NAME {self.repo}: give an owner and a name, as org/name")


def assemble(cfg: PushConfig, folder: Path) -> None:
    """Write all that is uploaded into `folder`: coders, figures, the features page, the card.

    Raises UsageError for what is no finished run, or a format that cannot hold its coders.
    """
    run, step = Path(cfg.run), newest_coders(Path(cfg.run))
    summary, paths = summary_of(cfg.run), kinds.list_coders(step)
    flags, figures = flags_of_run(run), figures_of(cfg.run)
    evaluated = read_json(run / "eval.json") if (run / "eval.json").is_file() else {}
    for name, path in paths.items():
        (folder / name).mkdir(parents=True)
        in_pieces = not (path / "sae.safetensors").is_file()  # which other programs cannot read
        for file in path.iterdir():
            # The rest is what only exact resuming needs.
            if not file.name.startswith(("resume", "sae") if in_pieces else "resume"):
                shutil.copyfile(file, folder / name / file.name)
        if in_pieces:
            copy_whole(folder / name, path)
    for program in dict.fromkeys(cfg.formats):
        if program != "sparsify":
            export_as_can_be(ExportConfig(cfg.run, out=str(folder / program), to=program))
    write_json(folder / "summary.json", _of_no_machine(summary, flags))
    for file, command in (
        ("eval.json", "evaluate RUN"),
        (_PAGE, f"features RUN --out RUN/{_PAGE}"),
    ):
        if not (run / file).is_file():
            print(f"note  {run} has no {file}, which python -m sae {command} makes: not in it")
    if evaluated:
        write_json(folder / "eval.json", _of_no_machine(evaluated, flags))
    if (run / _PAGE).is_file():
        page = (run / _PAGE).read_text(encoding="utf-8")
        (folder / _PAGE).write_text(_without_paths(page, flags), encoding="utf-8")
    coders = {name: _described(path) for name, path in paths.items()}
    groups = (SparseCoderConfig, ModelConfig, DataConfig, TrainingConfig, MachineConfig, RunConfig)
    defaults = {name: value for group in groups for name, value in flags_of(group()).items()}
    text = card(cfg.repo, flags, defaults, coders, figures, cfg.license, cfg.formats)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _described(path: Path) -> CoderFile:
    """A coder without its tensors."""
    cfg, rest = read_config(path / "cfg.json")
    with Stored(path, "sae") as stored:
        d_out = stored.shapes["b_dec"][0]
    return CoderFile(cfg, rest["d_in"], d_out, {})


def _of_no_machine(values: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """Figures without the paths of the machine that they were computed on."""
    found = json.loads(_without_paths(json.dumps(values), flags))
    if isinstance(of := found.get("of"), dict):  # what it was judged on may be other text
        found["of"] = {n: without_folder(v) if isinstance(v, str) else v for n, v in of.items()}
    for figures in found.get("hookpoints", {}).values():
        figures.pop("path", None)
    return found


def _without_paths(text: str, flags: dict[str, Any]) -> str:
    """A text in which names of files and folders of this machine have no folders before them."""
    named = {str(v) for v in flags.values() if isinstance(v, str) and "/" in v}
    for name in sorted(named, key=len, reverse=True):
        if Path(name).is_absolute() or Path(name).exists():
            text = text.replace(name, Path(name).name)
    return text


def upload(cfg: PushConfig, folder: Path) -> str:
    """Make the repository and commit `folder` to it; its address.

    Large files that an earlier try brought there are not sent again. Raises UsageError for a token
    that is missing or may not write, and for what the Hub refuses.
    """
    api = HfApi(token=cfg.hf_token)
    try:
        _check_rights(cfg, patiently(api.whoami))
        private = cfg.private or None
        patiently(lambda: api.create_repo(cfg.repo, private=private, exist_ok=True))
        message = f"Coders of {Path(cfg.run).resolve().name}"
        patiently(
            lambda: api.upload_folder(
                repo_id=cfg.repo, folder_path=folder, revision=cfg.revision, commit_message=message
            )
        )
    except (HfHubHTTPError, HFValidationError, HTTPError, RuntimeError, OSError) as error:
        # A large file that does not come through is a RuntimeError.
        raise UsageError(f"ORG/NAME {cfg.repo}: {_why_not(error)}") from None
    return f"{api.endpoint}/{cfg.repo}"


def _check_rights(cfg: PushConfig, who: dict[str, Any]) -> None:
    """Raise UsageError, before anything is sent, for a token that may not write there."""
    token = who.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise UsageError("--hf_token: may only read; make one that may write, in your settings")
    owner = cfg.repo.split("/")[0]
    orgs = {org.get("name"): org.get("roleInOrg") for org in who.get("orgs", ())}
    if owner == who.get("name"):
        return
    if owner not in orgs:
        raise UsageError(
            f"ORG/NAME {cfg.repo}: {who.get('name')} is not in {owner}; there are "
            f"{', '.join([str(who.get('name')), *map(str, orgs)])}"
        )
    if orgs[owner] == "read":
        raise UsageError(f"ORG/NAME {cfg.repo}: {who.get('name')} may only read in {owner}")


def _why_not(error: Exception) -> str:
    status = getattr(response_of(error), "status_code", None)
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        return "the Hub does not know who asks: give --hf_token, or set HF_TOKEN"
    if status == 403:
        return "the token may not do this: make one that may write there"
    if status == 404:
        return f"it is not there ({str(error).strip().splitlines()[0]})"
    if status == 429:
        return "the Hub takes no more requests for now (429); try again later"
    return f"it cannot be uploaded ({str(error).strip().splitlines()[0]}); try again"


def main(cfg: PushConfig) -> None:
    """Upload what the command line names, or write it into a folder."""
    with ExitStack() as stack:
        if cfg.dry_run is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            folder = Path(cfg.dry_run)
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise UsageError(f"--dry_run {folder}: is no empty folder; give a new one")
            folder.mkdir(parents=True, exist_ok=True)
        assemble(cfg, folder)
        if cfg.dry_run is not None:
            print(f"would be uploaded  {folder.resolve()}")
            return
        print(f"coders  {upload(cfg, folder)}")
