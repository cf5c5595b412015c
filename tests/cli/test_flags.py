"""Option names in a message become what is typed."""

from __future__ import annotations

import click
import pytest

from cloq_export.cli.adapt import command as adapt
from cloq_export.cli.export import command as export
from cloq_export.cli.flags import notes_with_flags, with_flags
from cloq_export.cli.output import progress_console
from cloq_export.cli.run import command as run


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("choose a smaller `seqlen` than 512.", "choose a smaller --seqlen than 512."),
        ("use `device=cpu`.", "use --device cpu."),
        ("choose `refine_steps=20` or `damping`.", "choose --set refine_steps=20 or --set damping."),
        ("name it with `finetune.data=NAME|FILE`.", "name it with --set finetune.data=NAME|FILE."),
        ("use `overrides='*.up_proj:bits=4'`.", "use --override '*.up_proj:bits=4'."),
        ("take `symmetric=false` `format=gptq_v2`.", "take --asymmetric --format gptq_v2."),
        # Commands, and words that are no option, stay.
        ("make one with `cloq adapt`; the package `datasets`", "make one with `cloq adapt`; the package `datasets`"),
    ],
)
def test_flags_of_run(message: str, typed: str) -> None:
    assert with_flags(message, run) == typed


def test_a_verb_has_its_own_flags() -> None:
    assert with_flags("name one with `adapters`", export) == "name one with --adapter"
    assert with_flags("another `adapter_name`, another `seqlen`", adapt) == "another --adapter-name, another --seqlen"
    assert with_flags("`pad_rank`, `two_bit=exact`", export) == "--pad-rank, --two-bit exact"
    # What an export cannot change, a run can.
    assert with_flags("`group_size=32`, `damping`", export) == "--group-size 32, --set damping"


def test_what_is_said_meanwhile_is_typed_too(capsys: pytest.CaptureFixture[str]) -> None:
    with click.Context(run), progress_console(as_json=False) as console:
        console.print("12 linear layers get no adapter; `expert_rank` gives them one", soft_wrap=True)
    assert capsys.readouterr().err == "12 linear layers get no adapter; --expert-rank gives them one\n"


def test_notes_are_typed_too() -> None:
    assert notes_with_flags({"notes": ["raise `samples`"], "bits": 2}, run) == {"notes": ["raise --samples"], "bits": 2}
    assert notes_with_flags({"bits": 2}, run) == {"bits": 2}
