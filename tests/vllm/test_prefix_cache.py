"""What computed blocks of a prompt are shared by; no engine is needed."""

from __future__ import annotations

import os
import pathlib
import shutil

from cloq_export.engines.vllm.plugin.prefix_cache import LoadedAdapters, files_signature


def write(folder: pathlib.Path, content: str) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    (folder / "adapter_model.safetensors").write_text(content, encoding="utf-8")
    return folder


def test_one_load_shares_and_every_spelling_of_its_path_is_the_same(tmp_path: pathlib.Path) -> None:
    folder, adapters = write(tmp_path / "a", "one"), LoadedAdapters()
    (tmp_path / "link").symlink_to(folder)
    adapters.load(1, folder)
    spellings = [folder, f"{folder}/", f"{folder}/../a", tmp_path / "link", os.path.relpath(folder)]
    assert len({adapters.key(1, spelling, f"r{number}") for number, spelling in enumerate(spellings)}) == 1


def test_another_load_shares_nothing_with_the_one_before(tmp_path: pathlib.Path) -> None:
    folder, adapters = write(tmp_path / "a", "one"), LoadedAdapters()
    adapters.load(1, folder)
    first = adapters.key(1, folder, "r1")
    adapters.load(2, folder)
    assert adapters.key(2, folder, "r2") != first  # the same files under another number
    write(folder, "two")
    adapters.load(1, folder)
    assert adapters.key(1, folder, "r3") != first  # other files under the same number
    assert adapters.key(1, folder, "r3") == adapters.key(1, folder, "r4")


def test_files_that_changed_since_they_were_loaded_share_nothing_until_the_next_load(tmp_path: pathlib.Path) -> None:
    folder, adapters = write(tmp_path / "a", "one"), LoadedAdapters()
    kept = shutil.copytree(folder, tmp_path / "kept")
    adapters.load(1, folder)
    first = adapters.key(1, folder, "r1")
    write(folder, "two")
    changed = [adapters.key(1, folder, "r2"), adapters.key(1, folder, "r3")]
    shutil.copytree(kept, folder, dirs_exist_ok=True)  # with the times of before
    changed.append(adapters.key(1, folder, "r4"))
    assert len({first, *changed}) == 4
    adapters.load(1, folder)
    assert adapters.key(1, folder, "r5") == adapters.key(1, folder, "r6")
    assert adapters.key(1, folder, "r5") not in {first, *changed}


def test_a_link_that_is_turned_to_another_folder_is_a_change(tmp_path: pathlib.Path) -> None:
    link = tmp_path / "latest"
    link.symlink_to(write(tmp_path / "step1", "one"))
    before = files_signature(link)
    link.unlink()
    link.symlink_to(write(tmp_path / "step2", "one"))
    assert files_signature(link) != before


def test_a_failed_load_and_a_missing_folder(tmp_path: pathlib.Path) -> None:
    folder, adapters = write(tmp_path / "a", "one"), LoadedAdapters()
    adapters.load(1, folder)
    adapters.forget(1)
    assert adapters.key(1, folder, "r1") != adapters.key(1, folder, "r2")
    assert files_signature(tmp_path / "none") == files_signature(tmp_path / "none")
    assert files_signature(tmp_path / "none") != files_signature(folder)


def test_what_is_read_again_for_every_request_is_shared_while_the_files_are_the_same(tmp_path: pathlib.Path) -> None:
    folder, adapters = write(tmp_path / "a", "one"), LoadedAdapters()
    first = adapters.key(1, folder, "r1", rereads=True)
    assert adapters.key(1, folder, "r2", rereads=True) == first
    write(folder, "two")
    assert adapters.key(1, folder, "r3", rereads=True) != first
