"""Coders from the Hub, by the real client and a small server on the loopback."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError
from loopback_hub import READER, WRITER, Hub, Repo, commit_of, loopback_hub
from other_programs import KINDS, random_coder, save_run

from sae import Sae, SaeConfig, SparseCoder, UsageError
from sae.formats.hub import patiently
from sae.share.export import ExportConfig, export

ROOT = Path(__file__).parents[2]
# One process per cache loads what it is told to, a line each, and says what it found.
LOADER = """
import json, os, sys
from sae import Sae, SaeConfig, UsageError, load_many
from sae.coders.bank import CoderBank
from sae.config import Widths
from sae.judge.trained import CodersConfig, named_coders
for call, name, arguments, environment in json.load(sys.stdin):
    os.environ.pop("HF_TOKEN", None)
    os.environ.update(environment)
    try:
        if call == "many":
            print(json.dumps(sorted(load_many(name, **arguments))))
        elif call == "finetune":
            cfg = SaeConfig(num_latents=24, k=3)
            bank = CoderBank({"layers.3": Widths(8, 8)}, cfg, (0,), "cpu")
            bank.load_pretrained(name, **arguments)
            print(json.dumps(bank["layers.3"].b_dec.tolist()))
        elif call == "evaluate":
            print(json.dumps(list(named_coders(CodersConfig(name, **arguments)))))
        else:
            print(json.dumps(Sae.load_from_hub(name, **arguments).num_latents))
    except UsageError as error:
        print(json.dumps(f"error: {error}"))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with loopback_hub() as server:
        yield server


def files_of(folder: Path) -> dict[str, bytes]:
    """Path below the folder -> content."""
    files = (f for f in folder.rglob("*") if f.is_file())
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in files}


def coders(folder: Path, *names: str, latents: int = 16) -> dict[str, bytes]:
    """The files of some coders."""
    for name in names:
        SparseCoder(8, SaeConfig(num_latents=latents, k=2)).save_to_disk(folder / name)
    return files_of(folder)


def load(hub: Hub, cache: Path, *calls: tuple[Any, ...], offline: bool = False) -> list[Any]:
    """What calls of (function, name, arguments, environment) return in a process of their own."""
    full = [(*call, *({}, {})[len(call) - 2 :]) for call in calls]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(cache)}
    environment |= {"HF_HUB_OFFLINE": "1" if offline else "0", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        *([sys.executable, "-c", LOADER],),
        input=json.dumps(full),
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_coders_are_pulled_by_name_revision_and_folder(hub: Hub, tmp_path: Path) -> None:
    """Only what was asked for is fetched, a cut download goes on, and the cache serves offline."""
    # The client writes what came in pieces of 10 MB.
    large = coders(tmp_path / "large", "layers.3", latents=2**19)
    main = coders(tmp_path / "main", "layers.10") | large
    main |= {"layers.3/resume.safetensors": b"0" * 9, "layers.3/ae.pt": b"0" * 9}
    main |= {f"wide/run/{name}": data for name, data in coders(tmp_path / "w", "layers.1").items()}
    old = coders(tmp_path / "old", "layers.3", latents=24)
    hub.repos["org/repo"] = Repo({"main": main, "v1": old})
    hub.cut_once.add("layers.3/sae.safetensors")
    theirs = random_coder(KINDS["sae"])
    run = save_run(tmp_path / "run", {"layers.3": theirs})
    (folder,) = export(ExportConfig(str(run), out=str(tmp_path / "theirs"), to="sae_lens"))[0]
    folder = folder.rename(folder.with_name("blocks.3.hook_resid_post"))
    hub.repos["org/theirs"] = Repo({"main": files_of(folder.parent)})
    beside = {f"sae_lens/{name}": data for name, data in files_of(folder.parent).items()}
    hub.repos["org/pushed"] = Repo({"main": old | beside})
    hub.repos["org/beside"] = Repo({"main": beside})
    found = load(
        *(hub, tmp_path / "cache"),
        ("one", "org/repo", {"hookpoint": "layers.3"}),
        ("many", "org/repo", {"pattern": "layers.*"}),
        ("one", "org/repo@v1", {"hookpoint": "layers.3"}),
        ("many", "org/repo/wide/run"),
        ("one", "org/repo", {"hookpoint": "layers.4"}),
        ("many", "org/repo@v2"),
        ("many", "org/repo/narrow"),
        ("finetune", "org/theirs"),
        ("finetune", "org/theirs/blocks.3.hook_resid_post"),
        ("many", "org/pushed"),
        ("many", "org/beside"),
    )
    assert found[9:] == [["layers.3"]] * 2
    assert not any("org/pushed" in line and "sae_lens" in line for line in hub.requests)
    assert found[7:9] == [theirs.b_dec.tolist()] * 2
    assert found[:4] == [2**19, ["layers.10", "layers.3"], 24, ["layers.1"]]
    assert "has no coder at hookpoint layers.4" in found[4]
    assert "org/repo has no revision v2" in found[5]
    assert "org/repo has no folder narrow" in found[6]
    gets = [line for line in hub.requests if line.startswith("GET") and "/resolve/" in line]
    first = commit_of("org/repo", "main")
    cut, resumed = (
        line for line in gets if line.startswith(f"GET /org/repo/resolve/{first}/layers.3/sae.s")
    )
    assert "bytes=" not in cut and "bytes=" in resumed
    assert not any("resume" in line or ".pt" in line for line in gets)
    asked = len(hub.requests)
    again = load(
        hub, tmp_path / "cache", ("one", "org/repo", {"hookpoint": "layers.3"}), offline=True
    )
    assert again == [2**19] and len(hub.requests) == asked


def test_what_the_hub_refuses_is_said_in_one_line(hub: Hub, tmp_path: Path) -> None:
    """401, 403, 404: the line names the repository and the way out; 429 is waited for."""
    files = coders(tmp_path / "c", "layers.3")
    hub.repos = {"org/gated": Repo({"main": files}, gated=True), "org/open": Repo({"main": files})}
    private = coders(tmp_path / "p", "layers.3", latents=24)
    hub.repos["org/private"] = Repo({"main": private}, private=True)
    hub.repos |= {f"org/{name}": Repo({"main": files}) for name in ("busy", "scoped", "new")}
    hub.busy |= {"GET /api/models/org/open/revision": 2, "GET /api/models/org/busy/revision": 99}
    hub.forbidden["GET /api/models/org/scoped/revision"] = 1
    reader = {"HF_TOKEN": READER}
    found = load(
        *(hub, tmp_path / "cache"),
        ("many", "org/absent"),
        ("many", "org/private"),
        ("many", "org/gated", {}, reader),
        ("many", "org/open"),
        ("many", "org/gated", {"token": WRITER}),
        ("finetune", "org/private", {"token": WRITER}),
        ("evaluate", "org/private", {"hf_token": WRITER}),
        ("many", "org/busy"),
        ("many", "org/scoped", {}, reader),
        ("many", "org/new", {}, {"HF_TOKEN": "hf_wrong"}),
    )
    assert "org/absent is neither a folder here nor on the Hub" in found[0]
    assert "org/private" in found[1] and "set HF_TOKEN" in found[1]
    assert "org/gated is gated" in found[2] and "set HF_TOKEN" in found[2]
    assert found[3:5] == [["layers.3"]] * 2
    assert (found.pop(5), found.pop(5)) == ([0.0] * 8, ["layers.3"])
    assert "org/busy: the Hub takes no more requests for now (429); try again later" in found[5]
    asked = [line for line in hub.requests if "org/busy" in line]
    assert 5 <= len(asked) < 50 and not hub.early  # each waits as long as it is asked to
    assert "org/scoped: HF_TOKEN is one that the Hub does not know, or that" in found[6]
    assert "org/new: HF_TOKEN is one that the Hub does not know" in found[7]
    secrets = (READER, WRITER, "hf_wrong")
    assert not any(token in line for token in secrets for line in map(str, found))


def test_a_busy_hub_is_waited_for_as_long_as_it_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry-After in seconds, a minute at most, five seconds if it is none; five tries in all."""
    waited: list[int] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    said = iter([{"Retry-After": "7"}, {}, {"Retry-After": "999"}, {"Retry-After": "Wed, 21 Oct"}])
    request = httpx.Request("GET", "http://hub")

    def busy() -> None:
        answer = httpx.Response(429, headers=next(said, {}), request=request)
        raise HfHubHTTPError("busy", response=answer)

    with pytest.raises(HfHubHTTPError):
        patiently(busy)
    assert waited == [7, 5, 60, 5]


def test_an_unknown_repository_is_refused_by_name() -> None:
    """What is neither a folder nor on the Hub is named in one line."""
    for load_by_name in (Sae.load_many, Sae.load_from_hub):
        with pytest.raises(UsageError, match="no-such/repo is neither a folder here nor on the"):
            load_by_name("no-such/repo")
    with pytest.raises(UsageError, match="not a path out of it"):
        Sae.load_many("no-such/repo/../../etc")
