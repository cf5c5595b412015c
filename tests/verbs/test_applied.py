"""Is an adapter applied on a base that is not ours: float, or of another tool, served by engines with faults."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from passing_runtime import PassingRuntime
from rich.console import Console

from cloq_export.cli import main
from cloq_export.engines.held_adapters import HeldAdapter
from cloq_export.errors import BindingError, FormatError, GateMissedError, UsageError
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.files.tensor_writer import write_safetensors
from cloq_export.formats.peft import read_adapter
from cloq_export.formats.peft.codec import write_binding
from cloq_export.verbs.verification import applied
from cloq_export.verbs.verification.applied import AppliedReport, verify_applied
from cloq_export.verbs.verification.options import VerifyOptions

DEAD = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def base(recipe_for: Any) -> str:
    return str(recipe_for("llama").model)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: str) -> Path:
    """Return an adapter as PEFT itself saves it, bound to nothing."""
    folder = tmp_path_factory.mktemp("adapters") / "mine"
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    made.save_pretrained(folder)
    return folder


@pytest.fixture
def options(adapter: Path, texts: dict[str, str]) -> VerifyOptions:
    return VerifyOptions(
        adapters=(f"mine={adapter}",), text=texts["eval_text"], window=24, windows=3, liveness_tokens=24
    )


def missed(report: AppliedReport) -> list[str]:
    return [check.what for check in report.checks if check.passed is False]


def served_by(monkeypatch: pytest.MonkeyPatch, kind: type[PassingRuntime]) -> None:
    monkeypatch.setitem(applied.OPENERS, "hf", lambda held, _: kind(held.served(torch.float32)))


def test_a_float_model_that_peft_serves(base: str, options: VerifyOptions, silent: Console) -> None:
    report = verify_applied(base, options, console=silent)
    assert report.passed
    assert report.missed() is None
    assert {(check.what, check.adapter, check.passed) for check in report.checks} == {
        ("logprob_difference_max", "mine", True),
        ("live_modules", "mine", True),
        ("weights", "mine", True),
        ("mixed_batch_difference_max", None, True),
    }
    assert [len(row.modules) for row in report.liveness] == [14]
    content = json.loads(json.dumps(report.to_json()))
    assert (content["format"], content["passed"], content["layout"]) == ("cloq-applied", True, None)


def test_a_checkpoint_of_another_tool(
    tmp_path: Path, options: VerifyOptions, adapter: Path, write_quantized: Any, silent: Console, monkeypatch: Any
) -> None:
    written = write_quantized(tmp_path / "packed")
    config = json.loads((written.folder / "config.json").read_text())
    config["quantization_config"] = {
        name: value for name, value in config["quantization_config"].items() if name != "cloq"
    }
    (written.folder / "config.json").write_text(json.dumps(config))
    unbound = tmp_path / "unbound"
    unbound.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (unbound / name).write_bytes((written.adapter / name).read_bytes())
    tensors, _ = read_safetensors(unbound / "adapter_model.safetensors")
    write_safetensors(unbound / "adapter_model.safetensors", tensors, {"format": "pt"})
    assert read_adapter(unbound).base_fingerprint is None
    monkeypatch.setattr(applied, "read_tokenizer", lambda _: None)
    monkeypatch.setattr(
        applied, "evaluation_tokens", lambda *_: torch.randint(96, (96,), generator=torch.Generator().manual_seed(0))
    )
    asked = dataclasses.replace(options, adapters=(f"mine={unbound}",))
    report = verify_applied(str(written.folder), asked, console=silent)
    assert report.passed, report.missed()
    assert report.layout is not None
    write_binding(unbound, base_model="x", base_fingerprint="sha256:" + "0" * 64)
    with pytest.raises(BindingError, match="an adapter is wrong on any other quantization"):
        verify_applied(str(written.folder), asked, console=silent)


class IgnoresModule(PassingRuntime):
    """Serves the adapter without one of its modules, as an engine does that does not know the module's name."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        layer = inner.model("mine").get_base_model().get_submodule(DEAD)
        layer.lora_B["default"].weight.data.zero_()

    def held_adapter(self, name: str) -> HeldAdapter | None:
        return self.inner.held_adapter(name)


def test_a_module_that_is_not_served_is_named(
    base: str, options: VerifyOptions, silent: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    served_by(monkeypatch, IgnoresModule)
    report = verify_applied(base, options, console=silent)
    assert not report.passed
    assert missed(report) == ["logprob_difference_max", "live_modules", "weights"]
    said = str(report.missed())
    assert "live_modules of mine: " in said
    assert {each.module: each.verdict for each in report.liveness[0].modules}[DEAD] == "ignored"
    assert f"weights of mine: the engine holds other weights than the files, or none, for {DEAD}" in said


class ServesBase(PassingRuntime):
    """Answers every request with the base, as a server does whose adapter never came."""

    def prompt_logprobs(self, token_ids: Any, adapters: Any) -> list[torch.Tensor]:
        return self.inner.prompt_logprobs(token_ids, [None] * len(token_ids))


def test_an_adapter_that_is_not_applied_at_all(
    base: str, options: VerifyOptions, silent: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    served_by(monkeypatch, ServesBase)
    report = verify_applied(base, options, console=silent)
    assert missed(report) == ["logprob_difference_max", "live_modules"]
    assert {each.verdict for each in report.liveness[0].modules} <= {"ignored", "undecided", "distorted"}
    weights = next(check for check in report.checks if check.what == "weights")
    assert weights.passed is None
    assert "install cloq-export beside it" in weights.reason


class Leaks(PassingRuntime):
    """In a mixed batch requests to the base get the adapter, as stock vLLM 0.32 has it on a CPU."""

    def prompt_logprobs(self, token_ids: Any, adapters: Any) -> list[torch.Tensor]:
        mixed = len(set(adapters)) > 1
        return self.inner.prompt_logprobs(token_ids, ["mine"] * len(token_ids) if mixed else adapters)


def test_an_adapter_that_leaks_into_other_requests(
    base: str, options: VerifyOptions, silent: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    served_by(monkeypatch, Leaks)
    report = verify_applied(base, options, console=silent)
    assert missed(report) == ["mixed_batch_difference_max"]


class Dies(PassingRuntime):
    def prompt_logprobs(self, token_ids: Any, adapters: Any) -> list[torch.Tensor]:
        raise RuntimeError("out of slots")


def test_an_engine_that_does_not_answer(
    base: str, options: VerifyOptions, silent: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    served_by(monkeypatch, Dies)
    report = verify_applied(base, options, console=silent)
    assert not report.passed
    assert "log-probabilities, mine: out of slots" in str(report.missed())


def test_half_precision_is_judged_by_its_modules(base: str, options: VerifyOptions, silent: Console) -> None:
    report = verify_applied(base, dataclasses.replace(options, dtype="bfloat16"), console=silent)
    judged = {check.what: check.passed for check in report.checks}
    assert judged["logprob_difference_max"] is judged["mixed_batch_difference_max"] is None
    assert judged["weights"]


def test_misuse(tmp_path: Path, base: str, options: VerifyOptions, silent: Console) -> None:
    with pytest.raises(UsageError, match="`runtime` is 'onnx'; without a float model allowed are hf, vllm"):
        verify_applied(base, dataclasses.replace(options, runtime="onnx"), console=silent)
    with pytest.raises(UsageError, match="no adapter was named"):
        verify_applied(base, dataclasses.replace(options, adapters=()), console=silent)
    with pytest.raises(GateMissedError, match="nothing was judged: the text has"):
        verify_applied(base, dataclasses.replace(options, window=10**7), console=silent)
    foreign = tmp_path / "awq"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}')
    with pytest.raises(FormatError, match="awq"):
        verify_applied(str(foreign), options, console=silent)


def test_the_command_line(
    base: str, options: VerifyOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", base, "--adapter", options.adapters[0], "--text", options.text]
    arguments += ["--window", "24", "--windows", "2", "--liveness-tokens", "24"]
    assert main(arguments) == 0
    assert "applied: yes" in capsys.readouterr().out
    served_by(monkeypatch, ServesBase)
    assert main([*arguments, "--json"]) == 3
    captured = capsys.readouterr()
    assert json.loads(captured.out)["passed"] is False
    assert "not shown to be applied: " in captured.err
    assert main(["verify", base]) == 2
    assert "no float model was given" in capsys.readouterr().err
