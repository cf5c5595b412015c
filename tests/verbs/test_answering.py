"""Tasks put to the models of a run: every model answers, and a killed call goes on to the same result."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cloq_export.engines.transformers.served import TransformersModel
from cloq_export.errors import BindingError, DataError, FormatError, RunDirectoryError, UsageError
from cloq_export.formats.peft import read_adapter, write_adapter
from cloq_export.parity import answers
from cloq_export.verbs import answering
from cloq_export.verbs.answering import group_means
from cloq_export.verbs.evaluate import evaluate
from cloq_export.verbs.export import export as write_export
from cloq_export.verbs.options import EvaluateOptions, ExportOptions
from cloq_export.verbs.run import run as make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, recipe_for: Any, silent: Console) -> Path:
    folder = tmp_path_factory.mktemp("answering") / "run"
    make_run(recipe_for("llama", bits=2), folder, console=silent)
    return folder


@pytest.fixture
def tasks(tmp_path: Path) -> tuple[str, ...]:
    """Return two tasks with questions in the words of the tiny model."""
    # Answers of this task are short.
    written = [{"instruction": f"w{n} w{n + 1}", "answer": ("true", "false")[n % 2]} for n in range(40)]
    (tmp_path / "boolq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    scored = [{"goal": f"w{n}", "sol1": f"w{n + 1} w{n + 2}", "sol2": f"w{n + 3}", "label": n % 2} for n in range(40)]
    (tmp_path / "piqa.json").write_text(json.dumps(scored))
    return f"boolq:instruction={tmp_path / 'boolq.jsonl'}", f"piqa={tmp_path / 'piqa.json'}"


def answer(run: Path, tasks: tuple[str, ...], silent: Console, **options: Any) -> dict[str, Any]:
    asked = EvaluateOptions(text="wikitext2", window=8, windows=1, tasks=tasks, **options)
    return evaluate(run, asked, console=silent).to_json()


def test_every_model_answers(run: Path, tasks: tuple[str, ...], silent: Console, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = answer(run, tasks, silent, problems=10, out=out)
    assert list(result["tasks"]) == ["boolq:instruction", "piqa"]
    assert "float" not in result  # perplexity was not asked for
    for entry in result["tasks"].values():
        assert list(entry["models"]) == ["float", "quantized", "adapter"]
        assert [(pair["first"], pair["second"]) for pair in entry["comparisons"]] == [
            ("float", "quantized"),
            ("float", "adapter"),
            ("quantized", "adapter"),
        ]
        assert entry["questions"] == 10
        assert all(len(found["answers"]) == 10 for found in entry["models"].values())
    assert json.loads((out / "tasks.json").read_text()) == result["tasks"]
    assert len(list(out.glob("answers-*.json"))) == 6
    # The adapter is asked with its pairs, and the codes without them.
    scores = [json.loads((out / f"answers-piqa-{name}.json").read_text()) for name in ("float", "quantized", "adapter")]
    assert len({json.dumps(held["answers"]) for held in scores}) == 3
    assert len({held["key"]["model"] for held in scores}) == 3


def test_a_killed_call_goes_on(
    run: Path, tasks: tuple[str, ...], silent: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "_CHUNK", 32)
    whole = answer(run, tasks, silent)
    asked: list[int] = []
    generate = TransformersModel.generate

    def killed(self: Any, token_ids: Any, *rest: Any, **options: Any) -> Any:
        asked.append(len(token_ids))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return generate(self, token_ids, *rest, **options)

    monkeypatch.setattr(TransformersModel, "generate", killed)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        answer(run, tasks, silent, out=out)
    held = json.loads((out / "answers-boolq-instruction-float.json").read_text())
    assert len(held["answers"]) == 32
    resumed = answer(run, tasks, silent, out=out)
    assert asked == [32, 8, 8, *[32, 8] * 2]
    assert resumed["tasks"] == whole["tasks"]
    with pytest.raises(RunDirectoryError, match="holds answers that were given under another questions; choose"):
        answer(run, tasks, silent, out=out, problems=5)


def test_bad_input_is_found_before_a_model_is_read(
    run: Path, tasks: tuple[str, ...], silent: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloq_export.verbs.evaluate.open_model", lambda *_, **__: pytest.fail("a model was read"))
    (tmp_path / "a.jsonl").write_text('{"instruction": "w1", "answer": 1}\n{"instruction": "w1", "answer": "none"}\n')
    with pytest.raises(DataError, match=r"line 2 of .*a.jsonl: no answer can be read out of 'none'"):
        answer(run, (f"svamp={tmp_path / 'a.jsonl'}",), silent)
    with pytest.raises(UsageError, match="`tasks` is 'svmp'"):
        answer(run, ("svmp",), silent)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="file is not a folder; choose another one with `out`"):
        answer(run, tasks, silent, out=tmp_path / "file")
    with pytest.raises(RunDirectoryError, match="run has no adapter 'another'; it has cloq"):
        answer(run, tasks, silent, adapter="another")
    read = read_adapter(run / "adapters" / "cloq")
    write_adapter(tmp_path / "other", read.pairs, base_model="m", base_fingerprint="sha256:" + "0" * 64)
    with pytest.raises(BindingError, match="is bound to the base sha256:000"):
        answer(run, tasks, silent, adapter=str(tmp_path / "other"))
    write_export(run, ExportOptions(format="merged", out=tmp_path / "merged"), console=silent)
    with pytest.raises(UsageError, match="merged is a merged export and takes no adapter; leave `adapter` out"):
        answer(tmp_path / "merged", tasks, silent, adapter="cloq")
    with pytest.raises(FormatError, match="nothing does not exist; give a run directory or a checkpoint folder"):
        answer(tmp_path / "nothing", tasks, silent)


def test_groups_have_a_mean() -> None:
    names = answering.GROUPS["arithmetic"]
    entries: dict[str, Any] = {
        name: SimpleNamespace(models={"float": SimpleNamespace(accuracy=n / 10)}) for n, name in enumerate(names)
    }
    assert group_means(entries) == {"arithmetic": {"float": pytest.approx(0.15)}}
    assert group_means(dict(list(entries.items())[1:])) == {}
