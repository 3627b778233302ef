"""Coders come from the Hub as from a folder, and no more of them than asked for."""

from pathlib import Path

import pytest

from sae import Sae, SaeConfig, SparseCoder, UsageError
from sae.formats import hub


def test_only_the_hookpoint_asked_for_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a repository only the hookpoint's folder is fetched, and a missing one is named."""
    SparseCoder(8, SaeConfig(num_latents=16, k=2)).save_to_disk(tmp_path / "layers.3")
    asked = []

    def snapshot(name: str, allow_patterns: list[str], **_: object) -> str:
        asked.append((name, allow_patterns[1]))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert Sae.load_from_hub("org/repo", hookpoint="layers.3").num_latents == 16
    assert list(Sae.load_many("org/repo", pattern="layers.*")) == ["layers.3"]
    assert asked == [("org/repo", "layers.3/*.safetensors"), ("org/repo", "layers.*/*.safetensors")]
    with pytest.raises(UsageError, match=r"layers\.4"):
        Sae.load_from_hub("org/repo", hookpoint="layers.4")


def test_an_unknown_repository_is_refused_by_name() -> None:
    """What is neither a folder nor on the Hub is named in one line."""
    for load in (Sae.load_many, Sae.load_from_hub):
        with pytest.raises(UsageError, match="no-such/repo is neither a folder here nor on the"):
            load("no-such/repo")
