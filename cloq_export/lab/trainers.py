"""Train from one start point: over packed codes, over the float model, or over bitsandbytes' NF4."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.compress.opening import plan_model
from cloq_export.compress.session import Session
from cloq_export.engines.transformers.loading import load
from cloq_export.lab.comparison import STARTS, ComparisonRecipe
from cloq_export.models.library_calls import NO_CODE
from cloq_export.models.saving import save_plain
from cloq_export.models.source import open_model
from cloq_export.models.tokenizer_files import read_tokenizer
from cloq_export.recipe import FineTuneRecipe, Recipe
from cloq_export.train.data import read_training_data
from cloq_export.train.launched import Placement
from cloq_export.train.pairs import zero_pairs
from cloq_export.verbs.finetune import finetune, run_training
from cloq_export.verbs.training_result import report_name
from cloq_export.verbs.training_start import ZERO_RANK, ZERO_START


class UnavailableError(Exception):
    """What a start needs is not there; its row says so."""


Trained = tuple[dict[str, Any], nn.Module, Any]


class Trainer:
    """Trains from one start."""

    def train(self, recipe: FineTuneRecipe, *, judge: bool = True) -> Trained:
        """Return the curve, the trained model in float32 arithmetic where it can have that, and its tokenizer."""
        raise NotImplementedError

    def forget(self, recipe: FineTuneRecipe) -> None:
        """Remove what a training left that only served to choose a rate."""
        raise NotImplementedError


class RunTrainer(Trainer):
    """Over packed codes, through the verb that users call; what is judged is read back from the files.

    Args:
        base: the run to train over.
        start: name of the start point.
        console: where progress goes.
    """

    def __init__(self, base: Path, start: str, console: Console) -> None:
        self._own = STARTS[start]
        self._name = start
        self._folder = base
        self._console = console

    def train(self, recipe: FineTuneRecipe, *, judge: bool = True) -> Trained:
        begin = ZERO_START if self._own.zero else self._name if self._own.adapt is not None else ""
        # Starts that share a base must not share a name.
        recipe = self._named(recipe).changed({"start": begin})
        directory = RunDirectory.open(self._folder)
        if report_name(recipe.name) not in directory.reports():
            shutil.rmtree(directory.adapter_path(recipe.name), ignore_errors=True)
            finetune(self._folder, recipe, console=self._console)
        curve = directory.read_report(report_name(recipe.name))
        tokenizer = read_tokenizer(directory.checkpoint_path)
        model = load(self._folder, recipe.name, dtype=torch.float32) if judge else nn.Identity()
        return curve, model, tokenizer

    def forget(self, recipe: FineTuneRecipe) -> None:
        directory = RunDirectory.open(self._folder)
        shutil.rmtree(directory.adapter_path(self._named(recipe).name), ignore_errors=True)
        shutil.rmtree(self._folder / "work" / f"finetune-{self._named(recipe).name}", ignore_errors=True)

    def _named(self, recipe: FineTuneRecipe) -> FineTuneRecipe:
        return recipe.changed({"name": f"{self._name}-{recipe.name}"})


class FloatTrainer(Trainer):
    """Over the float model in the training's precision, or over bitsandbytes' NF4 codes of it.

    Args:
        comparison: what is compared.
        start: name of the start point.
        bases: folder where training keeps its files.
        console: where progress goes.
    """

    def __init__(self, comparison: ComparisonRecipe, start: str, bases: Path, console: Console) -> None:
        self._comparison, self._name, self._bases, self._console = comparison, start, bases, console
        self._kind = STARTS[start].kind

    def train(self, recipe: FineTuneRecipe, *, judge: bool = True) -> Trained:
        placement = Placement.of(recipe)
        loaded = open_model(self._comparison.model, dtype=torch.float32)
        options = {**self._comparison.quantize, "model": self._comparison.model}
        options.pop("preset", None)
        plan, _ = plan_model(loaded.model, Recipe.from_mapping(options))
        shapes = {name: tuple(loaded.model.get_submodule(name).weight.shape) for name in plan.modules}
        model = loaded.model.to(placement.dtype) if self._kind == "float" else self._nf4(loaded, placement.dtype)
        attach_pairs(model, zero_pairs(shapes, dict.fromkeys(shapes, ZERO_RANK), recipe.seed))
        session = Session(self._console)
        data = read_training_data(recipe, loaded.tokenizer, bos=self._comparison.bos)
        folder = self._folder(recipe)
        training = run_training(session, model, data, recipe, folder, placement)
        if judge and self._kind == "float":
            model.to(torch.float32)
        return dataclasses.asdict(training.curve), model, loaded.tokenizer

    def forget(self, recipe: FineTuneRecipe) -> None:
        shutil.rmtree(self._folder(recipe), ignore_errors=True)

    def _folder(self, recipe: FineTuneRecipe) -> Path:
        return self._bases / f"{self._name}-work" / recipe.name

    def _nf4(self, loaded: Any, dtype: torch.dtype) -> nn.Module:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UnavailableError("bitsandbytes is not installed (pip install cloq-export[qlora])")
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        folder = self._bases / "float-model"
        if not (folder / "config.json").exists():
            save_plain(loaded, folder)
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, **NO_CODE)
        except Exception as error:  # the library raises whatever its backend raises
            raise UnavailableError(" ".join(str(error).split())[:200]) from None
        for module in model.modules():
            # On a CPU the library repacks its codes for good at the first evaluation, and only supports rows of whole
            # blocks; training must go on with the original codes.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model  # type: ignore[no-any-return]


def attach_pairs(model: Any, pairs: Mapping[str, Any]) -> None:
    """Let PEFT wrap linears of a model with given pairs, held in float32; nothing else asks for gradients.

    Args:
        model: a transformers model.
        pairs: full module name -> pair, all of one alpha over rank.
    """
    from peft import LoraConfig

    ranks = {name: pair.rank for name, pair in pairs.items()}
    largest = max(ranks.values())
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        target_modules=set(pairs),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != largest},
        alpha_pattern={name: rank for name, rank in ranks.items() if rank != largest},
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        model.add_adapter(config, "default")
    model.requires_grad_(False)
    for name, pair in pairs.items():
        layer = model.get_submodule(name)
        for side, values in ((layer.lora_A["default"], pair.lora_A), (layer.lora_B["default"], pair.lora_B)):
            side.weight = nn.Parameter(values.to(side.weight.device, torch.float32).clone())
