"""What belongs to a model besides its config and weights: tokenizer, processors, templates, settings, licence.

The files of a family are not listed by name: every family has its own, and one that stays behind is missed only where
the model is served. So a file is taken for its kind, and left for its kind: never weights, pickles, code, hidden files,
adapters, model cards, or what describes another layout of the weights.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from cloq_export.errors import SourceError
from cloq_export.files.safe_json import refuse_byte_order_mark
from cloq_export.files.safe_paths import require_inside

MAX_BYTES = 512 * 2**20
"""Of one file: the largest vocabularies have some 40 MB, and what is larger is no file of this kind."""

# Data that tokenizers and processors are made of: JSON, templates, SentencePiece, tiktoken, BPE, fairseq.
_SUFFIXES = (".json", ".jinja", ".model", ".spm", ".tiktoken", ".bpe", ".codes", ".vocab", ".tokenizer")
# Names that tokenizers have with other endings, such as tokenizer.model.v3 and vocab.txt.
_STEMS = ("tokenizer", "vocab.", "chat_template")
_TEXTS = re.compile(r"merges|vocab|dict|spm|bpe|token", re.IGNORECASE)
_LEGAL_WORDS = ("licence", "license", "notice", "copying", "copyright", "terms", "policy", "patent", "agreement")
_LEGAL = re.compile("|".join(_LEGAL_WORDS), re.IGNORECASE)

_WEIGHTS = (".safetensors", ".gguf", ".ggml", ".onnx", ".onnx_data", ".data", ".h5", ".msgpack", ".tflite", ".pb")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".dill", ".joblib", ".npy", ".npz", ".pdparams")
_CODE = (
    *(".py", ".pyc", ".pyi", ".pyx", ".ipynb", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".ps1"),
    *(".js", ".ts", ".jar", ".c", ".cc", ".cpp", ".cu", ".h", ".rs", ".go", ".lua", ".rb", ".pl"),
)
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".parquet", ".arrow", ".jsonl", ".csv")
_FOREIGN = (*_WEIGHTS, *_PICKLES, *_CODE, *_ARCHIVES)

# JSON that speaks of the weights in this very form, of a training, of an adapter, of a run, or of somebody's accounts.
_OTHER_JSON = re.compile(
    r"config\.json|.*\.index\.json|params\.json|consolidated.*|adapter_.*|modelcard\.json|model_index\.json"
    r"|(quant|quantize|quantization|hf_quant|compression)_config\.json|genai_config\.json|run\.json|cloq_.*"
    r"|(trainer|training|optimizer|scheduler)_.*|.*results?\.json|dataset_infos?\.json"
    r"|.*(credential|secret|password|api_key|service_account).*",
    re.IGNORECASE,
)
# The folder of the named chat templates of transformers 5.
_TEMPLATES = "additional_chat_templates"
# A folder with one of these is a tokenizer or processor of its own, as processors with several save them.
_SIGNS = (
    *("tokenizer_config.json", "tokenizer.json", "tekken.json", "preprocessor_config.json", "processor_config.json"),
    "video_preprocessor_config.json",
)
# A folder with one of these is a model, a run or an adapter, no matter what else it holds.
_OTHER_FOLDERS = ("config.json", "run.json", "adapter_config.json", "params.json", "trainer_state.json")


def companion_files(folder: Path) -> list[Path]:
    """Return the files of a model folder that travel with the model, besides its config and weights, sorted.

    Args:
        folder: the model's folder.

    Raises:
        SourceError: such a file is larger than any of its kind.
        FormatError: such a file is a link that leads out of the folder, or begins with a byte order mark, which the
            libraries that read it do not expect.
    """
    # A folder of links to the files of one model is that model's.
    config = folder / "config.json"
    homes = [config.resolve().parent] if config.is_symlink() and config.exists() else []
    companions: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.is_file():
            companions += [path] if is_companion(path.name) else []
        elif path.is_dir() and not path.name.startswith((".", "_")):
            companions += [inner for inner in sorted(path.iterdir()) if _belongs(path, inner)]
    for path in companions:
        require_inside(folder, path, also=homes)
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise SourceError(
                f"{path} has {size >> 20} MiB; a tokenizer, a processor or a licence has at most {MAX_BYTES >> 20}. "
                "Take the file out of the model's folder."
            )
        refuse_marked_file(path)
    return companions


def refuse_marked_file(path: Path) -> None:
    """Refuse a JSON file or a template that begins with a byte order mark.

    Args:
        path: the file; one of another kind is not looked at.

    Raises:
        FormatError: the mark is there.
    """
    if path.suffix in (".json", ".jinja"):
        with open(path, "rb") as file:
            refuse_byte_order_mark(file.read(4), str(path))


def is_companion(name: str) -> bool:
    """Return whether a file of a model folder travels with the model, by its name.

    Args:
        name: in the folder, with "/" before the name of a file in a folder of it.
    """
    *folders, last = PurePosixPath(name).parts
    if any(folder.startswith(".") for folder in folders) or last.startswith(".") or last.lower().startswith("readme"):
        return False
    suffix = PurePosixPath(last).suffix.lower()
    if suffix in _FOREIGN:
        return False
    if suffix == ".json":
        return _OTHER_JSON.fullmatch(last) is None
    if suffix in _SUFFIXES or last.startswith(_STEMS) or _LEGAL.search(last):
        return True
    return suffix == ".txt" and _TEXTS.search(last) is not None


def is_legal(name: str) -> bool:
    """Return whether a file is a licence, a notice or the like, by its name."""
    return is_companion(name) and PurePosixPath(name).suffix != ".json" and _LEGAL.search(name) is not None


def copy_companions(home: Path, paths: Iterable[Path], folder: Path) -> list[str]:
    """Copy files byte for byte to where they lie in their own folder.

    Args:
        home: the folder that the files belong to.
        paths: the files.
        folder: an existing folder.

    Returns:
        list: names of the files written, sorted, with "/" before the name of a file in a folder.
    """
    names = []
    for path in paths:
        name = path.relative_to(home)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
        names.append(name.as_posix())
    return sorted(names)


def hub_patterns() -> tuple[list[str], list[str]]:
    """Return (patterns of the files to fetch, patterns of those to leave) for the same rule on the hub."""
    # Patterns of the hub know upper and lower case.
    legal = [f"*{''.join(f'[{sign}{sign.upper()}]' for sign in word)}*" for word in _LEGAL_WORDS]
    wanted = [*(f"*{suffix}" for suffix in _SUFFIXES), *(f"{stem}*" for stem in _STEMS), "*.txt", *legal]
    # Other forms of the same weights lie in folders of their own.
    left = [*(f"*{suffix}" for suffix in _FOREIGN if suffix != ".safetensors"), "*/*.safetensors"]
    left += [f"{folder}/*" for folder in ("onnx", "openvino", "original", "coreml", "runs", "checkpoint-*", "*/*")]
    return wanted, left


def _belongs(folder: Path, path: Path) -> bool:
    """Return whether a file of a folder inside a model's folder travels with the model."""
    if not path.is_file() or not is_companion(path.name):
        return False
    if folder.name == _TEMPLATES:
        return path.suffix == ".jinja"
    if any((folder / name).exists() for name in _OTHER_FOLDERS):
        return False
    return is_legal(path.name) or any((folder / name).is_file() for name in _SIGNS)
