"""Whether what judges a training or a run is text that the codes were calibrated on."""

from __future__ import annotations

from collections.abc import Iterator

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.compress.job import WINDOWS_REPORT
from cloq_export.texts.corpora import CalibrationText
from cloq_export.texts.windows import tokens_drawn_from
from cloq_export.train.data import HeldOut, TrainingData


def windows_report(adapter: str = "") -> str:
    """Return the name of the report on the windows of a run, or of an adapter that was made for its codes later."""
    return f"{WINDOWS_REPORT}-{adapter}" if adapter else WINDOWS_REPORT


def calibrated_tokens(directory: RunDirectory, held_out: HeldOut | None, adapter: str = "") -> int:
    """Return how many tokens that are held out of a training the run was calibrated on.

    Args:
        directory: the run.
        held_out: a stretch of a text; None where examples are evaluated on.
        adapter: the one that the training starts from.
    """
    if held_out is None:
        return 0
    known = set(directory.reports())
    names = [name for name in dict.fromkeys((windows_report(), windows_report(adapter))) if name in known]
    span = (held_out.start, held_out.end)
    return max((tokens_drawn_from(directory.read_report(name), held_out.sha256, span) for name in names), default=0)


def notes_on_held_out(directory: RunDirectory, data: TrainingData, calibrated: int) -> Iterator[str]:
    """Yield what is to be said where a held-out loss is not of new text.

    Args:
        directory: the run.
        data: what is learned and evaluated on.
        calibrated: how many tokens of the stretch that is held out the run was calibrated on.
    """
    if data.held_out is not None and calibrated:
        whole = data.held_out.end - data.held_out.start
        yield (
            f"the codes were calibrated on {calibrated} of the {whole} tokens that are held out, so the held-out loss "
            "is lower than on new text; make the run with a `reserve` of so many tokens and one sequence more, or name "
            "other text with `eval_data`"
        )
    if data.held_out is None and data.evaluated is not None and windows_report() in directory.reports():
        origin = (data.eval_data or data.data).origin
        if origin in (text["origin"] for text in directory.read_report(windows_report())["texts"]):
            yield (
                f"examples of {origin} are held out, and the codes were calibrated on windows of it, so the held-out "
                "loss may be lower than on new text; name other examples with `eval_data`"
            )


def notes_on_evaluation(calibration: CalibrationText, evaluation: CalibrationText | None) -> Iterator[str]:
    """Yield what is to be said where a run is measured on a text that it is calibrated on.

    Args:
        calibration: one text or a mix.
        evaluation: the text to measure on; None where nothing is measured.
    """
    if evaluation is not None and evaluation.sha256 in (text.sha256 for text in calibration.parts or (calibration,)):
        yield (
            f"perplexity is measured on the text that the codes are calibrated on ({evaluation.origin}), so it is "
            "lower than on new text; name another one with `eval_text`"
        )
