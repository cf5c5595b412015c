"""One `cloq` command in a process of its own, with the tokens counted that go through each kind of model.

    python gate_cost_child.py COUNTS.json LAYERS verify EXPORT ...

It imports whichever cloq_export stands on the path, of any version.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

# An adapter's wrapper, and what lies in it.
_WRAPPED = "base_layer"


class TokenCounter:
    """Counts what goes through decoder blocks: kind of the model -> tokens, those of single steps apart.

    The kind is the class of the first quantized or plain linear of a block; a token that runs through half of them
    counts half.
    """

    def __init__(self) -> None:
        self.tokens: Counter[tuple[str, str]] = Counter()

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Note one call of a module, if it is a decoder block; the first input is (batch, tokens, hidden)."""
        if not type(module).__name__.endswith("DecoderLayer") or not inputs or inputs[0].ndim != 3:
            return
        states = inputs[0]
        step = "decode" if states.shape[1] == 1 else "prefill"
        self.tokens[(_kind(module), step)] += states.shape[0] * states.shape[1]

    def write(self, path: Path, layers: int) -> None:
        """Write the counts as JSON, in tokens through a whole model of so many blocks."""
        rows = [
            {"model": kind, "step": step, "tokens": count / layers}
            for (kind, step), count in sorted(self.tokens.items())
        ]
        path.write_text(json.dumps(rows), encoding="utf-8")


def _kind(block: nn.Module) -> str:
    return next(
        type(module).__name__
        for module in block.modules()
        if hasattr(module, "in_features") and not hasattr(module, _WRAPPED)
    )


def main() -> None:
    """Run the command that the arguments hold, and write the counts however it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", type=Path, help="file to write")
    parser.add_argument("layers", type=int, help="decoder blocks of the model")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a verb of cloq with its arguments")
    chosen = parser.parse_args()
    sys.argv = ["cloq", *chosen.command]
    counter = TokenCounter()
    register_module_forward_pre_hook(counter)
    try:
        runpy.run_module("cloq_export", run_name="__main__")
    finally:
        counter.write(chosen.counts, chosen.layers)


if __name__ == "__main__":
    main()
