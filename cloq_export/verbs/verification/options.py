"""What `verify` can be asked to do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cloq_export.errors import UsageError
from cloq_export.recipe import CHOICES, FIELDS
from cloq_export.recipe.checks import at_least, one_of, option
from cloq_export.verbs.options import refuse_unmeant

# Losses of accuracy that can be asked for.
_LEAST_LOSS, _LARGEST_LOSS = 0.005, 0.5


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """What `verify` is asked to do."""

    reference: str | None = option(
        None,
        "The float model: a folder, a hub id or a GGUF file. Without it, and with --adapter, all that is asked is "
        "whether each adapter is applied, on any base.",
        metavar="MODEL",
    )
    runtime: str = option("hf", "What serves.", one_of(("hf", "vllm", "vllm-server", "onnx")))
    adapters: tuple[str, ...] = option(
        (),
        "Adapter to serve; can be repeated. Unless given, all that EXPORT has.",
        flag="--adapter",
        metavar="NAME=FOLDER|NAME|FOLDER",
    )
    tasks: tuple[str, ...] = option(
        ("ppl",),
        "What is measured besides the numbers; tasks as in `cloq eval`.",
        separator=",",
        metavar="ppl,TASK[=FILE],...",
    )
    gate: Path | None = option(None, "YAML file of limits.", metavar="FILE")  # noqa: RUF009 (it returns a field)
    dtype: str = option("float32", "Of the served activations.", one_of(("float32", "bfloat16", "float16")))
    device: str = option("cpu", "Of transformers models.", metavar="cpu|cuda[:N]")
    text: str = option(FIELDS["eval_text"].default, "wikitext2, gsm8k, embedded, a file or a hub id.")
    window: int = option(512, "Tokens in a window.", at_least(2))
    windows: int = option(16, "How many windows.", at_least(1))
    bos: str = option(
        FIELDS["bos"].default,
        "Begin token before each window and prompt of the text: as the tokenizer does by itself, never, or always.",
        one_of(CHOICES["bos"]),
    )
    gsm8k: str | None = option(None, "The same as --tasks gsm8k=FILE.", metavar="FILE")
    problems: int | None = option(
        None, "Questions of each task, which must be there; unless given, up to 100.", at_least(1), metavar="N"
    )
    detect: float | None = option(
        None,
        "Loss of accuracy that is to be seen: as many questions of each task are asked as that needs, which must be "
        "there.",
        metavar="SHARE",
    )
    shots: int = option(0, "Worked examples before each.", at_least(0))
    prompts: int = option(32, "Greedy texts to compare.", at_least(0))
    new_tokens: int = option(32, "Tokens in each of them.", at_least(1))
    longest: int | None = option(
        None, "Tokens in the longest text; unless given, what is served, up to 2048.", at_least(2), metavar="N"
    )
    liveness_tokens: int | None = option(
        None,
        "Tokens on which every module is shown to be live; unless given, 32 in float32, else 64.",
        at_least(2),
        metavar="N",
    )
    seed: int = option(0, "Of the random signs that scales of modules are screened with.")
    run: Path | None = option(  # noqa: RUF009 (it returns a field)
        None, "The run that EXPORT was made from: its layers and adapters are compared too.", metavar="RUN"
    )
    other_reference: bool = option(False, "Take a float model that is not the revision that the run was made from.")
    force: bool = option(False, "Take adapters of another base; the report says so.")
    python: Path | None = option(  # noqa: RUF009 (it returns a field)
        None, "Interpreter of the environment that has vLLM; unless given, this one.", metavar="PATH"
    )
    out: Path | None = option(None, "For parity.json and parity.html.", metavar="FOLDER")  # noqa: RUF009 (it returns a field)

    @property
    def measures_packed(self) -> bool:
        """Return whether our own runtime is measured in addition to the one that serves: not if it is the same."""
        return self.runtime not in ("hf", "onnx") or self.dtype != "float32"

    def check(self) -> None:
        """Refuse values that make no sense.

        Raises:
            UsageError: names the first of them.
        """
        if not self.reference:
            raise UsageError(
                "no float model was given; name the one that the export was made from with `reference=MODEL`, or "
                "adapters with `adapters` to ask only whether they are applied."
            )
        refuse_unmeant(self)
        if self.detect is not None and not _LEAST_LOSS <= self.detect <= _LARGEST_LOSS:
            raise UsageError(
                f"`detect` is {self.detect}; a share of the questions from {_LEAST_LOSS} to {_LARGEST_LOSS} is needed, "
                "for example 0.03 for three points."
            )
        if self.detect is not None and self.problems is not None:
            raise UsageError(
                f"`problems` is {self.problems} and `detect` is {self.detect}; either of them says how many questions "
                "are asked: leave one out."
            )
