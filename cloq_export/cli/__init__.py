"""The command line `cloq`: one file per verb, imported when the verb is used.

Exit codes: 0 done, 1 failed, 2 misuse, 3 a gate was missed, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from cloq_export import __version__
from cloq_export.cli.streams import drop_closed_streams, prepared_streams, refused_output, write_line
from cloq_export.errors import CloqError, OutputError
from cloq_export.files.versions import require_versions
from cloq_export.process.termination import Termination, interrupted_by_termination

# verb -> its line in `cloq --help`; the command is `command` in the module of the same name.
VERBS = {
    "run": "From a model to a measured checkpoint with its adapter, in one go.",
    "quantize": "Calibrate, and make codes, scales and zeros for every linear layer.",
    "adapt": "Make an adapter for the codes of a run, or of another tool's checkpoint.",
    "finetune": "Train an adapter over the codes of a run; the codes stay.",
    "compare": "Train from several start points, and put the results side by side.",
    "frontier": "Perplexity for every stored bit: all methods, and other packages.",
    "export": "Write a deployable folder: a layout, adapters, certificate, model card.",
    "convert": "Turn any quantized checkpoint that is read into another layout.",
    "push": "Upload an export to the model hub.",
    "serve": "Serve an export with its adapters through vLLM, OpenAI-compatible.",
    "eval": "Measure perplexity and answers: float, quantized, with adapter.",
    "verify": "Gate an export: served against trained, from bytes to answers.",
    "data": "Write generated word problems to look at, train on or test with.",
    "inspect": "Explain a run, an export, an adapter, or a foreign checkpoint.",
}
_MODULES = {"eval": "evaluate"}
# Verbs that write layer by layer and go on where they stopped.
_RESUMABLE = ("run", "quantize", "adapt", "finetune", "compare", "frontier", "export")
_ASK_FOR_HELP = {"-h", "--help", "--version"}
_INTERRUPTED, _CLOSED_PIPE, _TERMINATED = (128 + number for number in (2, 13, 15))  # SIGINT, SIGPIPE, SIGTERM

# Errors of the operating system -> what the user can do.
_OF_THE_SYSTEM = {
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOSPC: "make room, or name a folder on another disk with TMPDIR",
    errno.EDQUOT: "make room, or name a folder on another disk with TMPDIR",
    errno.EROFS: "name a folder that can be written",
    errno.EACCES: "check the permissions, or name another folder",
    errno.EPERM: "check the permissions, or name another folder",
}

# How torch begins to tell of a GPU that is lost, hangs or was reset; what is said there has no class without torch.
_OF_A_GPU = ("CUDA error", "CUDA driver error", "cuDNN error", "NCCL error")


class _EndedFromOutsideError(Exception):
    """Carries a signal or a closed pipe, its cause, past click, which would handle both differently."""


class _VerbGroup(click.Group):
    """A group that knows its verbs by name and imports one only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        import cloq_export.lab  # noqa: F401  # registers choices of the recipe that the verbs' options offer

        module = importlib.import_module(f"cloq_export.cli.{_MODULES.get(cmd_name, cmd_name)}")
        command: click.Command = module.command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CloqError as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            if command is not None:
                from cloq_export.cli.flags import with_flags  # recipes are not needed for help

                error.args = (with_flags(str(error), command),)
            raise
        except (KeyboardInterrupt, BrokenPipeError) as error:
            # click would end on both with an empty line and code 1.
            raise _EndedFromOutsideError from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], VERBS, n=1)
            hint = f"did you mean `{near[0]}`? " if near else ""
            ctx.fail(f"there is no verb {args[0]!r}; {hint}the verbs are {', '.join(VERBS)}.")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    cls=_VerbGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failed, 2 misuse, 3 a gate was missed. Start with: cloq run --demo",
)
@click.version_option(__version__, prog_name="cloq")
def cli() -> None:
    """Turn a causal language model into a 2/3/4-bit checkpoint with a CLoQ adapter, and measure it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; unexpected exceptions keep their traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with prepared_streams(), interrupted_by_termination():
        try:
            return _run(arguments)
        except _EndedFromOutsideError as error:
            cause = error.__cause__
            if isinstance(cause, BrokenPipeError):
                # What `cloq ... | head` ends with, as if the signal of a closed pipe had ended it.
                if not drop_closed_streams():
                    raise cause from None
                return _CLOSED_PIPE
            return _tell_interrupt(arguments, cause)
        except (click.Abort, KeyboardInterrupt) as error:
            return _tell_interrupt(arguments, error)


def _run(arguments: list[str]) -> int:
    try:
        asks_for_help = bool(_ASK_FOR_HELP.intersection(arguments))
        if not asks_for_help:
            require_versions()
            _require_folder()
        # A call for help writes to standard output only.
        with refused_output() if asks_for_help else contextlib.nullcontext():
            outcome: Any = cli.main(args=arguments, prog_name="cloq", standalone_mode=False)
    except CloqError as error:
        write_line(f"error: {' '.join(str(error).split())}", sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in _OF_THE_SYSTEM:
            raise
        place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        write_line(f"error: {place}{error.strerror}; {_OF_THE_SYSTEM[error.errno]}.", sys.stderr)
        return CloqError.exit_code
    except RuntimeError as error:
        if not str(error).startswith(_OF_A_GPU):
            raise
        first = str(error).partition("\n")[0].rstrip(".")
        rest = f"{_what_remains(arguments)}; look at the GPU with nvidia-smi first"
        write_line(f"error: the GPU gave up ({first}): {rest}.", sys.stderr)
        return CloqError.exit_code
    except click.ClickException as error:
        error.show(file=sys.stderr)
        return error.exit_code
    return outcome if isinstance(outcome, int) else 0


def _require_folder() -> None:
    """Refuse to start in a folder that was deleted: libraries below end the process in words of their own.

    Raises:
        OutputError: it is gone.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise OutputError(
            "the folder that the command was started in no longer exists; change to one that does, and run it again."
        ) from None


def _what_remains(arguments: list[str]) -> str:
    verb = next((argument for argument in arguments if argument in VERBS), "")
    keeps = verb in _RESUMABLE or (verb == "eval" and any(argument.startswith("--out") for argument in arguments))
    return "the same command continues where it stopped" if keeps else "nothing was written"


def _tell_interrupt(arguments: list[str], interrupt: BaseException | None) -> int:
    write_line(f"interrupted: {_what_remains(arguments)}.", sys.stderr)
    return _TERMINATED if isinstance(interrupt, Termination) else _INTERRUPTED
