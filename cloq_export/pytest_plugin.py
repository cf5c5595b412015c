"""A pytest plugin: `pytest --cloq-export DIR --cloq-reference MODEL` runs the parity gate, one test for each limit.

It is loaded into every pytest of the environment, so nothing but pytest is imported before the option is given.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from cloq_export.verbs.verification.options import VerifyOptions


def _tasks(text: str) -> tuple[str, ...]:
    from cloq_export.files.spelled_paths import split_list

    return tuple(dict.fromkeys(task for task in split_list(text, ",", label="=") if task))


# Name of an option of `cloq verify` -> what its text is made into, what stands for it in the help, and the help.
_OPTIONS: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "reference": (str, "MODEL", "the float model of the export"),
    "gate": (Path, "FILE", "YAML file of limits"),
    "runtime": (str, "NAME", "hf (default), vllm or vllm-server"),
    "python": (Path, "PATH", "interpreter of the environment that has vLLM"),
    "dtype": (str, "NAME", "float32 (default), bfloat16 or float16"),
    "tasks": (_tasks, "LIST", "ppl (default) and tasks as in cloq eval, with commas between"),
    "text": (str, "TEXT", "wikitext2 (default), embedded, a file or a hub id"),
    "window": (int, "N", "tokens in a window (512)"),
    "windows": (int, "N", "how many windows (16)"),
    "gsm8k": (str, "FILE", "problems of GSM8K as JSON lines"),
    "problems": (int, "N", "questions of each task, which must be there (up to 100)"),
    "detect": (float, "SHARE", "loss of accuracy that is to be seen; chooses how many questions are asked"),
    "longest": (int, "N", "tokens in the longest text (what is served, up to 2048)"),
    "run": (Path, "RUN", "the run that the export was made from"),
    "out": (Path, "FOLDER", "where parity.json and parity.html are written"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the gate."""
    group = parser.getgroup("cloq", "parity gate of cloq_export")
    group.addoption("--cloq-export", metavar="DIR", help="Gate this export: one test for each limit.")
    for name, (kind, metavar, text) in _OPTIONS.items():
        group.addoption(f"--cloq-{name}", type=kind, metavar=metavar, help=f"With --cloq-export: {text}.")
    group.addoption(
        "--cloq-adapter",
        action="append",
        default=[],
        metavar="NAME=FOLDER|NAME|FOLDER",
        help="With --cloq-export: an adapter to serve; can be repeated.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse options that make no sense, before anything is collected."""
    given = [f"--cloq-{name}" for name in _OPTIONS if config.getoption(f"--cloq-{name}") is not None]
    given += ["--cloq-adapter"] if config.getoption("--cloq-adapter") else []
    if config.getoption("--cloq-export") is None:
        if given:
            raise pytest.UsageError(f"{given[0]} belongs to an export; name it with --cloq-export DIR.")
    elif config.getoption("--cloq-reference") is None:
        raise pytest.UsageError("--cloq-export needs the float model; name it with --cloq-reference MODEL.")


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the gate's tests to what was collected."""
    if config.getoption("--cloq-export") is not None:
        items.extend(ParityGate.from_parent(session, name="cloq_export", nodeid="cloq_export").collect())


class ParityGate(pytest.Collector):
    """The limits of one export; what they judge is measured once, when the first of them runs."""

    report: Any = None
    failure: Exception | None = None

    def collect(self) -> Iterator[pytest.Item]:
        """Yield one test for each limit, known from headers and the gate file alone."""
        from cloq_export.errors import CloqError
        from cloq_export.verbs.verify import planned_gates

        try:
            limits = planned_gates(*self._arguments())
        except CloqError as error:
            raise pytest.UsageError(str(error)) from None
        for name in limits:
            yield LimitItem.from_parent(self, name=name)

    def measured(self) -> Any:
        """Return the report, measuring on the first call; a failure is kept too, because it took as long."""
        if self.failure is not None:
            raise self.failure
        if self.report is None:
            from cloq_export.verbs.verify import verify

            with warnings.catch_warnings():
                # A suite that turns warnings into errors means its own code, not the libraries that load a model.
                warnings.simplefilter("ignore")
                try:
                    self.report = verify(*self._arguments())
                except Exception as error:
                    self.failure = error
                    raise
        return self.report

    def _arguments(self) -> tuple[Path, VerifyOptions]:
        from cloq_export.verbs.verification.options import VerifyOptions

        chosen = {name: self.config.getoption(f"--cloq-{name}") for name in _OPTIONS}
        given = {name: value for name, value in chosen.items() if value is not None}
        options = VerifyOptions(adapters=tuple(self.config.getoption("--cloq-adapter")), **given)
        return Path(self.config.getoption("--cloq-export")), options


class LimitMissed(Exception):
    """A limit that the export does not keep."""


class LimitItem(pytest.Item):
    """One limit of the gate."""

    def runtest(self) -> None:
        """Fail if the limit is missed, or if what it is on was not measured."""
        from cloq_export.parity.gate import explain_miss

        assert isinstance(self.parent, ParityGate)
        report = self.parent.measured()
        verdict = next(each for each in report.gates if each.gate == self.name)
        if not verdict.passed:
            reasons = [f"{entry.what} could not be measured: {entry.reason}" for entry in report.missing]
            if self.name == "certificate" and report.certificate.reason:
                reasons = [report.certificate.reason]
            if self.name in ("provenance", "reference", "float_part"):
                entries = report.float_part if self.name == "float_part" else report.provenance.findings
                reasons = [f"{each.what}: {each.reason}" for each in entries if each.reason]
            raise LimitMissed("\n".join([explain_miss(verdict), verdict.meaning, *reasons]))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Return the reason alone: a traceback through this plugin says nothing about it."""
        from cloq_export.errors import CloqError

        if isinstance(excinfo.value, (LimitMissed, CloqError)):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Return what a failure is headed with."""
        return Path(self.config.getoption("--cloq-export")), None, f"parity gate: {self.name}"
