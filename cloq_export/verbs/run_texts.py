"""The texts of a run: what it is calibrated on, what it is measured on, and that both stay the same."""

from __future__ import annotations

import dataclasses

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.errors import CalibrationError, MissingPackageError, RunDirectoryError
from cloq_export.recipe import Recipe
from cloq_export.texts.corpora import EMBEDDED, WIKITEXT2, CalibrationText, evaluation_text, load_text

# The report of a run that says which text it was calibrated on; the recipe names it, and a name's content may change.
TEXT_REPORT = "calibration"
_EMBEDDED_NOTE = (
    "WikiText-2 is not at hand, so the demo calibrates on the first four fifths of the text embedded in Python "
    "(pydoc_data.topics) and measures on the rest: figures are not comparable with those of WikiText-2"
)


@dataclasses.dataclass(frozen=True)
class RunTexts:
    """What a run is calibrated and measured on.

    Args:
        calibration: the calibration text.
        evaluation: the text to measure on; None where nothing is measured.
        notes: what was taken instead of what the recipe names.
    """

    calibration: CalibrationText
    evaluation: CalibrationText | None
    notes: tuple[str, ...] = ()


def run_texts(recipe: Recipe, *, demo: bool, measures: bool = True) -> RunTexts:
    """Return the texts that a recipe names; only the demo may fall back to another one, and says so.

    Args:
        recipe: calibration and eval_text.
        demo: where WikiText-2 is not at hand, take the text that Python itself carries.
        measures: whether a text to measure on is needed.

    Raises:
        CalibrationError: a text cannot be read.
        MissingPackageError: it is on the hub, and `datasets` is not installed.
    """
    try:
        return RunTexts(load_text(recipe.calibration), evaluation_text(recipe.eval_text) if measures else None)
    except (CalibrationError, MissingPackageError):
        wanted = (recipe.calibration, recipe.eval_text) if measures else (recipe.calibration,)
        if not demo or set(wanted) != {WIKITEXT2}:
            raise
    return embedded_texts()


def calibration_text_of(directory: RunDirectory, recipe: Recipe) -> RunTexts:
    """Return the text that a run was calibrated on, the one that its demo fell back to if it did."""
    if recipe.calibration == WIKITEXT2 and origin_of(directory).startswith(EMBEDDED):
        return embedded_texts()
    return RunTexts(load_text(recipe.calibration), None)


def origin_of(directory: RunDirectory) -> str:
    """Return where the calibration text of a run is from, as the run noted it; empty if it did not yet."""
    noted = directory.read_report(TEXT_REPORT) if TEXT_REPORT in directory.reports() else {}
    return str(noted.get("origin", ""))


def embedded_texts() -> RunTexts:
    """Return two parts of the text that Python carries: what is measured must not have been calibrated on."""
    whole = load_text(EMBEDDED)
    cut = whole.text.rfind("\n\n", 0, int(len(whole.text) * 0.8))
    return RunTexts(
        CalibrationText.of(whole.text[:cut], f"{whole.origin}, first four fifths"),
        CalibrationText.of(whole.text[cut:], f"{whole.origin}, last fifth"),
        (_EMBEDDED_NOTE,),
    )


def bind_text(directory: RunDirectory, calibration: CalibrationText) -> None:
    """Note which text a run is calibrated on, and refuse to go on with another one under the same name.

    Raises:
        RunDirectoryError: the text differs from the run's.
    """
    if TEXT_REPORT not in directory.reports():
        directory.write_report(TEXT_REPORT, {"origin": calibration.origin, "sha256": calibration.sha256})
        return
    held = directory.read_report(TEXT_REPORT)
    if held.get("sha256") != calibration.sha256:
        raise RunDirectoryError(
            f"{directory.path} holds a run that was calibrated on another text: {held.get('origin')} (sha256 "
            f"{str(held.get('sha256'))[:12]}…) in the run, {calibration.origin} (sha256 {calibration.sha256[:12]}…) "
            "now. Restore the text to continue the run, or choose another folder with `out`."
        )
