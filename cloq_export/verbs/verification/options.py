"""What `verify` can be asked to do."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path

from cloq_export.errors import UsageError
from cloq_export.recipe import CHOICES

RUNTIME_NAMES = ("hf", "vllm", "vllm-server", "onnx")
DTYPE_NAMES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """What `verify` is asked to do.

    Args:
        reference: the float model: a folder, a hub id or a GGUF file.
        runtime: what serves: "hf", "vllm", "vllm-server", or "onnx" for an ONNX export.
        adapters: NAME=FOLDER, a name in the export, or a folder; none takes all that the export has.
        tasks: "ppl", and any of `task_names()`, as TASK or TASK=FILE, or a group of them.
        gate: a gate file; None takes the default limits.
        dtype: of the served activations.
        device: of the float model, the reference and the transformers runtime.
        text: as in `evaluate`.
        window: tokens in a window.
        windows: how many at most.
        bos: what each window and each prompt of the text begins with: "auto", "never" or "always".
        gsm8k: file of its problems; None takes the data folder's or the hub's.
        problems: how many questions of each task, from the start, which must be there; None takes up to 100.
        shots: worked examples before each problem.
        prompts: greedy continuations that are compared.
        new_tokens: tokens in each of them.
        longest: length of the longest text that is measured and continued; None takes what the model is served with,
            as far as the text, memory and 2048 tokens go.
        liveness_tokens: tokens on which modules are shown to be live.
        seed: of the bootstrap.
        force: take adapters of another base; the report says so.
        python: the interpreter of the environment in which vLLM is installed; None is this one.
        out: folder for parity.json and parity.html; None writes none.
        run: the run that the export was made from, whose artefacts are compared too; None takes what the export
            records of it.
        other_reference: take a float model that is not the one that the run was made from; the report says so.
    """

    reference: str
    runtime: str = "hf"
    adapters: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("ppl",)
    gate: Path | None = None
    dtype: str = "float32"
    device: str = "cpu"
    text: str = "wikitext2"
    window: int = 512
    windows: int = 16
    bos: str = "auto"
    gsm8k: str | None = None
    problems: int | None = None
    shots: int = 0
    prompts: int = 32
    new_tokens: int = 32
    longest: int | None = None
    liveness_tokens: int = 64
    seed: int = 0
    force: bool = False
    python: Path | None = None
    out: Path | None = None
    run: Path | None = None
    other_reference: bool = False

    @property
    def measures_packed(self) -> bool:
        """Return whether our own runtime is measured beside the one that serves: not if it is the same."""
        return self.runtime not in ("hf", "onnx") or self.dtype != "float32"

    def check(self) -> None:
        """Refuse values that cannot be meant.

        Raises:
            UsageError: names the first of them.
        """
        for flag, value, allowed in (
            ("--runtime", self.runtime, RUNTIME_NAMES),
            ("--dtype", self.dtype, DTYPE_NAMES),
            ("--bos", self.bos, CHOICES["bos"]),
        ):
            if value not in allowed:
                near = difflib.get_close_matches(value, allowed, n=1)
                hint = f" did you mean {near[0]!r}?" if near else ""
                raise UsageError(f"{flag} is {value!r}; allowed are {', '.join(allowed)}.{hint}")
        for flag, number, least in (
            ("--window", self.window, 2),
            ("--windows", self.windows, 1),
            ("--problems", 1 if self.problems is None else self.problems, 1),
            ("--longest", 2 if self.longest is None else self.longest, 2),
            ("--shots", self.shots, 0),
            ("--prompts", self.prompts, 0),
            ("--new-tokens", self.new_tokens, 1),
            ("--liveness-tokens", self.liveness_tokens, 2),
        ):
            if number < least:
                raise UsageError(f"{flag} is {number}; it must be at least {least}.")
