"""Render the results of all families as docs/models.md."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping

from check_family import LAYOUTS, FamilyResult
from configurations import LEFT_OUT

_INTRODUCTION = """# Models

What was done with one tiny random model of every causal family in transformers {version}, and with the wrappers whose
text part is one. Each was made from its own config class, taken through `cloq run` (4 bits, group 32, adapter of rank
4), `cloq export` in {layouts}, `cloq_export.load` and `cloq verify`. What was
loaded was compared with the model's own files in which the weights of quantized layers had been replaced by their
dequantized codes, read by a decoder that shares no code with this package: same names in files, other tensors the same
bytes, log-probabilities within 1e-4 in float32.

`run` means that all of this held; behind it stands what was left out. `refused` means that the command ended with one
line, which is given here. Sizes of real models differ: what stays float for its size is decided for each model, and
printed before any work. Wrappers without a line have not been done yet, and these are left out: {left_out}.

{counts}.

The table is rendered from `tests/models/families/results.jsonl`:

```
.venv/bin/python tests/models/families/run_families.py \\
    --results tests/models/families/results.jsonl --page docs/models.md
```

"""
_OUTCOMES = {"passed": "run", "refused": "refused", "crashed": "crashed", "wrong": "wrong"}


def render_page(results: Mapping[str, FamilyResult], *, version: str) -> str:
    """Return the page of all results.

    Args:
        results: family -> what came of it.
        version: of transformers.
    """
    counted = collections.Counter(_OUTCOMES[result.outcome] for result in results.values())
    counts = ", ".join(f"{number} {outcome}" for outcome, number in counted.most_common())
    layouts = " and ".join(f"`{layout}`" for layout in LAYOUTS)
    rows = [_row(result) for result in sorted(results.values(), key=lambda result: result.family)]
    table = [
        "| family | class | outcome | quantized | stays float | share that stays float |",
        "|---|---|---|---|---|---|",
    ]
    reasons: dict[str, list[str]] = {}
    for family, reason in LEFT_OUT.items():
        reasons.setdefault(reason, []).append(family)
    introduction = _INTRODUCTION.format(
        version=version,
        layouts=layouts,
        counts=f"{len(results)} families: {counts}",
        left_out="; ".join(f"{', '.join(families)} ({reason})" for reason, families in reasons.items()),
    )
    return introduction + "\n".join([*table, *rows, ""])


def _row(result: FamilyResult) -> str:
    outcome = _OUTCOMES[result.outcome] + (f": {_short(result.reason)}" if result.reason else "")
    floats = "; ".join(f"{name}{f': {reason}' if reason else ''}" for name, reason in _last_parts(result.floats))
    quantized = ", ".join(sorted({name.rpartition(".")[2] for name in result.quantized}))
    share = f"{result.float_share:.1%}" if result.outcome == "passed" else ""
    return f"| {result.family} | {result.architecture} | {outcome} | {quantized} | {floats} | {share} |"


def _last_parts(floats: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted({(name.rpartition(".")[2], reason) for name, reason in floats})


def _short(reason: str) -> str:
    return reason.replace("|", "/")[:300]
