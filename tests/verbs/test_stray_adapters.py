"""A folder among the adapters that holds none: passed over at every door, and said in the same words."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cloq_export.artifact.adapters import AdapterShelf
from cloq_export.artifact.inspection import describe
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.compress.session import Session
from cloq_export.verbs.export_adapters import asked_adapters
from cloq_export.verbs.options import ExportOptions, ServeOptions
from cloq_export.verbs.serve import adapter_notes, served_adapters
from cloq_export.verbs.stored_model import choose_adapter


@pytest.fixture(params=["run", "export"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, written: Any) -> Path:
    home = tmp_path / "home"
    if request.param == "run":
        with RunDirectory.create_or_resume(home, {"model": "m"}, "sha256:1", {}) as run:
            shutil.copytree(written.folder, run.checkpoint_path)
    else:
        shutil.copytree(written.folder, home)
    shutil.copytree(written.adapter, home / "adapters" / "mine")
    (home / "adapters" / "stray").mkdir()
    return home


def test_every_door_passes_over_a_folder_that_holds_no_adapter(folder: Path, silent: Console) -> None:
    note = f"{folder / 'adapters' / 'stray'} holds no adapter_config.json, so it is no adapter and was left out; "
    described = describe(folder).to_json()
    assert [adapter["name"] for adapter in described["adapters"]] == ["mine"]
    assert list(served_adapters(folder)) == ["mine"]
    exporting, measuring = Session(silent), Session(silent)
    assert list(asked_adapters(exporting, AdapterShelf.of(folder), ExportOptions())) == ["mine"]
    assert choose_adapter(measuring, folder, "cloq") == "mine"
    for notes in (described["notes"], adapter_notes(folder, ServeOptions()), exporting.notes, measuring.notes):
        assert len(notes) == 1
        assert notes[0].startswith(note)


def test_an_adapter_from_outside_that_carries_more_is_said(folder: Path, tmp_path: Path, written: Any) -> None:
    outside = Path(shutil.copytree(written.adapter, tmp_path / "outside"))
    (outside / "tokenizer.json").write_text("{}")
    *_, said = adapter_notes(folder, ServeOptions(adapters=(f"theirs={outside}",)))
    assert said.startswith(
        f"the folder of the adapter theirs, {outside}, holds more than an adapter: 'tokenizer.json'."
    )
