"""A tiny model with a run and two trained adapters, which the scripts about the gate of `cloq verify` share.

Its heads are 32 wide, the narrowest that vLLM's attention computes on a CPU.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

CONTEXT = 128
SILENT = Console(file=io.StringIO())
_WORDS = [f"w{number}" for number in range(93)]
_VOCABULARY = ["<unk>", "<s>", "</s>", *_WORDS]


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is verified, and how.

    Args:
        model: folder of the float model.
        text: the file that calibrated it, and on which everything is measured.
        run: with the adapters cloq, one and two.
    """

    model: Path
    text: Path
    run: Path

    def options(self, **changed: Any) -> Any:
        """Return the options of a small verification."""
        from cloq_export.verbs.verification.options import VerifyOptions

        small = {"window": 48, "windows": 6, "prompts": 6, "new_tokens": 8, "liveness_tokens": 48}
        return VerifyOptions(str(self.model), text=str(self.text), **(small | changed))

    def export(self, out: Path, layout: str = "gptq_v2") -> Path:
        """Write an export of the run with all its adapters."""
        from cloq_export.verbs.export import export as write_export
        from cloq_export.verbs.options import ExportOptions

        write_export(self.run, ExportOptions(format=layout, out=out), console=SILENT)
        return out


def make_subject(place: Path, *, bits: int = 2, seed: int = 0, **recipe: Any) -> Subject:
    """Make a random Llama, a run of it, and two adapters that are trained on different data.

    Args:
        place: an existing folder, which holds no such model yet.
        bits: of the codes.
        seed: of the weights.
        recipe: more options of the run.
    """
    from cloq_export.recipe import FineTuneRecipe, Recipe
    from cloq_export.verbs.finetune import finetune
    from cloq_export.verbs.run import run as make_run

    model = write_tiny_llama(place / "float", seed)
    text = place / "text.txt"
    text.write_text(random_text(5000, seed=seed + 3), encoding="utf-8")
    options = {
        "group_size": 32,
        "rank": 8,
        "samples": 8,
        "seqlen": 64,
        "precision": "float32",
        "error_aware": 0.0,
        "calibration": str(text),
        "eval_text": str(text),
        "eval_window": 48,
        "eval_windows": 6,
    }
    run = place / "run"
    make_run(Recipe.from_mapping({"model": str(model), "bits": bits, **options, **recipe}), run, console=SILENT)
    for name, shift in (("one", 0), ("two", 7)):
        rows = [{"prompt": f"w{n} w{n + 1}", "completion": f" w{(n + shift) % 90} w{n + 2}"} for n in range(32)]
        data = place / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        trained = {"steps": 4, "batch_size": 4, "seqlen": 32, "learning_rate": 5e-3, "eval_samples": 4, "seed": shift}
        asked = FineTuneRecipe.from_mapping({"data": str(data), "name": name, "precision": "float32", **trained})
        finetune(run, asked, console=SILENT)
    return Subject(model, text, run)


def write_tiny_llama(folder: Path, seed: int, context: int = CONTEXT) -> Path:
    """Write a random Llama of two layers with its tokenizer, and return its folder.

    Args:
        folder: that does not exist yet.
        seed: of the weights.
        context: tokens that it reads at most.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(_VOCABULARY),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.15, generator=generator)
        else:
            # Norms that are no constant, so that what is moved between them shows.
            parameter.data.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    write_word_tokenizer(folder, _VOCABULARY)
    return folder


def write_word_tokenizer(folder: Path, vocabulary: Sequence[str]) -> None:
    """Write a tokenizer of whole words.

    Args:
        folder: of the model.
        vocabulary: with "<unk>", "<s>" and "</s>".
    """
    import tokenizers
    import transformers

    words = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def random_text(words: int, seed: int) -> str:
    """Return words that the tokenizer knows, some more often than others.

    Args:
        words: how many.
        seed: of the draw.
    """
    import torch

    drawn = len(_WORDS) * torch.rand(words, generator=torch.Generator().manual_seed(seed)).pow(2)
    return " ".join(_WORDS[int(number)] for number in drawn) + "\n"
