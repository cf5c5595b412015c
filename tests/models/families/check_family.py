"""Take a tiny random model of one family through run, export and load, and say what came of it.

Everything that is compared is computed from files: the float model's own files with the weights of quantized linears
replaced by their dequantized codes are what transformers loads as the reference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Literal

import checkpoints
import configurations
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

Outcome = Literal["passed", "refused", "crashed", "wrong"]

TOLERANCE = 1e-4  # of a log-probability, what the project promises in float32
LAYOUTS = ("gptq_v2", "compressed_tensors")
_BEGINNING = 12
_GATE_MISSED = 3


@dataclasses.dataclass(frozen=True)
class FamilyResult:
    """What came of a family.

    Args:
        family: the model type of its config.
        architecture: the class that its checkpoints name.
        outcome: of all steps together.
        step: the last one that was begun.
        reason: the line that refused it, or what crashed or differed.
        quantized: names of its quantized modules, numbers of blocks and experts replaced by *.
        floats: names of linears of its blocks that stayed float -> why.
        float_share: of the weights in its blocks' linears, what stayed float.
        differences: layout -> largest difference of a log-probability.
        seconds: that it took.
    """

    family: str
    architecture: str
    outcome: Outcome
    step: str
    reason: str = ""
    quantized: tuple[str, ...] = ()
    floats: tuple[tuple[str, str], ...] = ()
    float_share: float = 0.0
    differences: tuple[tuple[str, float], ...] = ()
    seconds: float = 0.0

    def to_json(self) -> str:
        """Return the result as one line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def of_json(cls, line: str) -> FamilyResult:
        """Return the result of a line."""
        fields = json.loads(line)
        pairs = {name: tuple(map(tuple, fields[name])) for name in ("floats", "differences")}
        return cls(**{**fields, "quantized": tuple(fields["quantized"]), **pairs})


class RefusedError(Exception):
    """The command line ended with one line and no traceback."""


class WrongError(Exception):
    """Something that was written or computed is not what it has to be."""


class _Steps:
    """The steps of one family, and what they learned."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.folder = family, folder
        self.step = "build"
        self.quantized: set[str] = set()
        self.floats: dict[str, str] = {}
        self.float_share = 0.0
        self.note = ""
        self.interleaved = False
        self.merged: checkpoints.Tensors = {}
        self.differences: dict[str, float] = {}

    def take(self) -> None:
        ids = self._ids()
        source = self.folder / "model"
        self._make_model(source)
        floats = checkpoints.read_tensors(source)
        run = self.folder / "run"
        self.step = "run"
        self._cloq("run", source, "--out", run, "--recipe", self._recipe(), "--json")
        for layout in LAYOUTS:
            self.step = f"export {layout}"
            out = self.folder / layout
            self._cloq("export", run, "--format", layout, "--out", out, "--json")
            adapter = next(path.parent for path in sorted(out.rglob("adapter_config.json")))
            self.step = f"read {layout}"
            expected = self._reference(floats, source, out, adapter, ids)
            self.step = f"load {layout}"
            self._compare(layout, out, adapter, ids, expected)
        self.step = "export merged"
        merged = self.folder / "merged"
        try:
            self._cloq("export", run, "--format", "merged", "--out", merged, "--json")
            self._compare_merged(merged)
        except RefusedError as error:
            if "fused in one tensor" not in str(error):
                raise
            self.note = "a merged export is refused: transformers reads the experts fused in one tensor"
        self.step = "generate"
        self._compare_texts(out, source)
        self.step = "done"

    def _make_model(self, folder: Path) -> None:
        config = configurations.tiny_config(self.family)
        model_class = getattr(transformers, configurations.architecture_of(self.family))
        torch.manual_seed(0)
        model = model_class(config).eval()
        with torch.no_grad():
            for module in model.modules():
                _randomize(module)
        with torch.no_grad():
            self.expects_text = model(input_ids=self._ids(), use_cache=False).logits
        if not bool(torch.isfinite(self.expects_text).all()) or float(self.expects_text.std()) < 0.02:
            raise AssertionError(f"the random model says nothing: {self.expects_text.std()}")
        self.interleaved = not all(getattr(module, "is_concatenated", True) for module in model.modules())
        model.save_pretrained(folder)
        write_tokenizer(folder)

    def _ids(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        return torch.randint(3, configurations.WORDS, (2, _BEGINNING), generator=generator)

    def _recipe(self) -> Path:
        recipe = {
            "bits": 4,
            "group_size": 32,
            "rank": 4,
            "samples": 4,
            "seqlen": 32,
            "calibration": str(self._text("calibration", 600)),
            "eval_text": str(self._text("evaluation", 400)),
            "eval_window": 16,
            "eval_windows": 2,
            "device": "cpu",
            "precision": "float32",
        }
        path = self.folder / "recipe.json"
        path.write_text(json.dumps(recipe))
        return path

    def _text(self, name: str, words: int) -> Path:
        generator = torch.Generator().manual_seed(len(name))
        drawn = torch.randint(3, configurations.WORDS, (words,), generator=generator)
        path = self.folder / f"{name}.txt"
        path.write_text(" ".join(f"w{number}" for number in drawn.tolist()) + "\n")
        return path

    def _cloq(self, *arguments: object) -> dict[str, Any]:
        from cloq_export.cli import main

        said, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            code = main([str(argument) for argument in arguments])
        lines = [line for line in errors.getvalue().splitlines() if line.startswith("error: ")]
        if code == _GATE_MISSED:
            raise WrongError(lines[-1].removeprefix("error: "))
        if code:
            raise RefusedError(lines[-1].removeprefix("error: "))
        summary: dict[str, Any] = json.loads(said.getvalue())
        return summary

    def _reference(
        self, floats: checkpoints.Tensors, source: Path, export: Path, adapter: Path, ids: torch.Tensor
    ) -> torch.Tensor:
        """Return what the float files say with dequantized weights; refuse other names or floats than theirs."""
        config = json.loads((export / "config.json").read_text())
        tensors = checkpoints.read_tensors(export)
        weights = checkpoints.dequantized(tensors, config["quantization_config"])
        beside = checkpoints.without_codes(tensors)
        fused = [checkpoints.fuse_experts(part, floats, interleaved=self.interleaved) for part in (weights, beside)]
        if any(fused):
            self.note = "experts are stored one by one, and the source's files hold them in one tensor"
        if checkpoints.cut_joined(beside, floats):
            self.note = "tensors that transformers joins when it reads are stored joined"
        unknown = [name for name in (*weights, *beside) if name not in floats]
        lost = [name for name in floats if name not in weights and name not in beside]
        if unknown or lost:
            raise WrongError(
                f"names in files: {unknown[:2]} are new, {lost[:2]} are gone ({len(unknown)}, {len(lost)})"
            )
        changed = [name for name in beside if not torch.equal(beside[name], floats[name])]
        if changed:
            raise WrongError(f"float tensors differ from the source: {changed[:3]} ({len(changed)})")
        shapes = [name for name in weights if weights[name].shape != floats[name].shape]
        if shapes:
            raise WrongError(f"{shapes[0]} has another shape than in the source")
        reference = self.folder / "reference"
        shutil.copytree(source, reference, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file({**floats, **weights}, reference / "model.safetensors", metadata={"format": "pt"})
        model = open_float(reference, configurations.architecture_of(self.family))
        checkpoints.merge_adapter(model, adapter)
        self.merged = model.state_dict()
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        return torch.log_softmax(logits, dim=-1)

    def _compare_merged(self, folder: Path) -> None:
        """Compare every tensor of a merged export with the reference's, which it is rounded from."""
        model = open_float(folder, configurations.architecture_of(self.family))
        for name, tensor in model.state_dict().items():
            expected = self.merged[name].to(torch.float32)
            difference = (tensor.to(torch.float32) - expected).abs()
            if not bool((difference <= 2.0**-8 * expected.abs() + 1e-6).all()):
                raise WrongError(f"{name} is off by {float(difference.max()):.2g}, more than rounding to bfloat16")

    def _compare(self, layout: str, export: Path, adapter: Path, ids: torch.Tensor, expected: torch.Tensor) -> None:
        import cloq_export

        model: Any = cloq_export.load(export, adapter)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        self._describe(model)
        difference = float((torch.log_softmax(logits, dim=-1) - expected).abs().max())
        self.differences[layout] = difference
        if not difference <= TOLERANCE:
            raise WrongError(f"log-probabilities differ by {difference:.2g} from those of the files")

    def _describe(self, model: nn.Module) -> None:
        """Learn which linears of the loaded model are packed, and which are not."""
        from cloq_export.engines.packed_linear import PackedLinear

        head = model.get_output_embeddings()
        linears = {
            name.removesuffix(".base_layer"): module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and ".lora_" not in name and module is not head
        }
        packed = {name for name, module in linears.items() if isinstance(module, PackedLinear)}
        # Only beside what is quantized: towers of images and projectors are carried along as they are.
        lists = {name[: match.start()] for name in packed if (match := re.search(r"\.\d+\.", name))}
        beside = {name for name in linears if name not in packed and any(name.startswith(one + ".") for one in lists)}
        report = json.loads((self.folder / "run" / "reports" / "layers.json").read_text())
        reasons = report.get("stays_float", {})
        self.quantized = {generic_name(name) for name in packed}
        self.floats = {generic_name(name): reasons.get(name, "") for name in beside}
        sizes = {name: linears[name].in_features * linears[name].out_features for name in packed | beside}
        self.float_share = sum(sizes[name] for name in beside) / sum(sizes.values())

    def _compare_texts(self, export: Path, source: Path) -> None:
        if not _generates_what_it_says(open_float(source, configurations.architecture_of(self.family)), self._ids()):
            self.note = "transformers' own generate() gives other tokens than its forward pass: texts are not compared"
            return
        self._verify(
            *("verify", export, "--reference", source, "--text", self.folder / "evaluation.txt"),
            *("--window", 16, "--windows", 2, "--prompts", 3, "--new-tokens", 6, "--longest", 24),
            *("--liveness-tokens", 160, "--json"),
        )

    def _verify(self, *arguments: object) -> None:
        try:
            self._cloq(*arguments)
        except WrongError as error:
            # Experts that the router gives no token, and selections that select all, have no effect to be seen.
            missed = re.findall(r"(\w+) is [\d.e+-]+, at (?:most|least)", str(error))
            if missed != ["live_modules"] or "is dead" in str(error):
                raise
            self.note = "some modules have no effect on the tokens of the test"


def _randomize(module: nn.Module) -> None:
    """Give what multiplies numbers of a size at which every layer counts; norms and recurrences keep their start."""
    for name, parameter in module.named_parameters(recurse=False):
        if isinstance(module, nn.Embedding):
            parameter.normal_(std=0.5)
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1)
        elif parameter.ndim == 3 and not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            parameter.normal_(std=min(parameter.shape[1:]) ** -0.5)
        elif name == "weight" and parameter.ndim == 2 and not parameter.any():
            parameter.normal_(std=0.1)


def _generates_what_it_says(model: Any, ids: torch.Tensor) -> bool:
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        texts = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
        said = model(input_ids=texts[:, :-1], use_cache=False).logits[:, ids.shape[1] - 1 :].argmax(-1)
    return torch.equal(said, texts[:, ids.shape[1] :])


def open_float(folder: Path, architecture: str) -> Any:
    """Return the float model of a folder, as its own class reads it, with the embeddings of its files.

    Some classes (Youtu's) begin the row of the padding token anew after they are loaded.
    """
    model = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32)
    tensors = checkpoints.read_tensors(folder)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding) and f"{name}.weight" in tensors:
                module.weight.copy_(tensors[f"{name}.weight"])
    return model.eval()


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of whole words."""
    import tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, configurations.WORDS)}}
    words |= {f"<extra{number}>": number for number in range(configurations.WORDS, configurations.VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<pad>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    wrapped.save_pretrained(folder)
    read = transformers.AutoTokenizer.from_pretrained(folder)
    if len(read("w3 w4", add_special_tokens=False)["input_ids"]) == 2:
        return
    # For some families transformers makes a byte pair tokenizer, whatever tokenizer.json says.
    letters = ["<pad>", "<s>", "</s>", "w", *"0123456789", "Ġ", "Ċ"]
    pairs = type(read)(vocab={letter: number for number, letter in enumerate(letters)}, merges=[], unk_token="<pad>")
    pairs.save_pretrained(folder)


def generic_name(name: str) -> str:
    """Return a tensor's or module's name with its numbers replaced by *."""
    return ".".join("*" if part.isdigit() else part for part in name.removesuffix(".weight").split("."))


def check_family(family: str, folder: Path) -> FamilyResult:
    """Return what comes of a family; files go into `folder`."""
    started = time.perf_counter()
    steps = _Steps(family, folder)
    outcome: Outcome = "passed"
    reason = ""
    try:
        steps.take()
        reason = steps.note
    except RefusedError as error:
        outcome, reason = "refused", str(error)
    except WrongError as error:
        outcome, reason = "wrong", str(error)
    except ImportError as error:
        needed = " ".join(str(error).split())[:120]
        outcome, reason = "refused", f"its class cannot be made without a package that is not installed ({needed})"
    except Exception as error:
        outcome = "crashed"
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = (
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({Path(where.filename).name}:{where.lineno})"
        )
        print(traceback.format_exc(), file=sys.stderr)
    return FamilyResult(
        family,
        configurations.architecture_of(family),
        outcome,
        steps.step,
        reason.replace(f"{folder}/", ""),
        quantized=tuple(sorted(steps.quantized)),
        floats=tuple(sorted(steps.floats.items())),
        float_share=round(steps.float_share, 4),
        differences=tuple(steps.differences.items()),
        seconds=round(time.perf_counter() - started, 1),
    )
