"""What is checked before an engine starts; no engine is needed."""

from __future__ import annotations

import json
import pathlib
import shutil
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.probe_record import ProbeRecord
from cloq_export.cli import main
from cloq_export.engines.vllm import plan as vllm_plan
from cloq_export.engines.vllm.facts import EngineFacts, engine_facts
from cloq_export.engines.vllm.plugin.adapters import POLICY_VARIABLE, check_name, derived_name, smallest_rank
from cloq_export.errors import BindingError, EngineError, FormatError, MissingPackageError, SourceError, UsageError
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.files.tensor_writer import write_safetensors
from cloq_export.formats.peft import read_adapter, write_adapter
from cloq_export.types import LoraPair, QuantSpec
from cloq_export.verbs.options import ServeOptions
from cloq_export.verbs.recording import note_adapter
from cloq_export.verbs.serve import default_answer, plan_serving, served_adapters, unbound_notes


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[EngineFacts], None]:
    """Return a function that says which vLLM there is."""

    def say(facts: EngineFacts) -> None:
        monkeypatch.setattr(vllm_plan, "engine_facts", lambda python: facts)

    say(EngineFacts("0.32.0", cuda=False))
    return say


def option(plan: Any, flag: str) -> str:
    return plan.command[plan.command.index(flag) + 1]


def refuse(export: pathlib.Path, **options: Any) -> str:
    with pytest.raises((UsageError, FormatError, BindingError)) as caught:
        plan_serving(export, ServeOptions(port=0, **options))
    return str(caught.value)


@pytest.mark.usefixtures("on")
def test_no_option_lets_the_code_of_a_model_run(export: Any) -> None:
    for flag in ("--trust-remote-code", "--trust_remote_code", "--trust-rem", "--trust-remote-code=true"):
        message = refuse(export.folder, default="two", engine_options=(flag,))
        assert "runs Python code that comes with a model, which cloq never does" in message


@pytest.mark.usefixtures("on")
def test_a_missing_tokenizer_is_told_before_an_engine_starts(write_export: Any) -> None:
    folder = write_export(QuantSpec(4, 32)).folder
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(SourceError, match=r"holds no tokenizer\.json and no other vocabulary"):
        plan_serving(folder, ServeOptions(default="two", port=0, kv_cache_gib=1))
    skipping = ServeOptions(default="two", port=0, kv_cache_gib=1, engine_options=("--skip-tokenizer-init",))
    with pytest.raises(SourceError, match=r"holds no tokenizer\.json .* To serve without a proof .* use `skip_proof`"):
        default_answer(folder, plan_serving(folder, skipping), [])


@pytest.mark.usefixtures("on")
def test_a_config_that_ties_what_the_files_hold_apart_is_not_served(write_export: Any) -> None:
    folder = write_export(QuantSpec(4, 32)).folder
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    options = ServeOptions(default="two", port=0, kv_cache_gib=1)
    if "lm_head.weight" not in Checkpoint.open(folder).headers:
        plan_serving(folder, options)
        path = folder / "model.safetensors"
        tensors, metadata = read_safetensors(path)
        write_safetensors(
            path, {**tensors, "lm_head.weight": 2 * tensors["model.embed_tokens.weight"]}, metadata=metadata
        )
    message = refuse(folder, default="two", kv_cache_gib=1)
    assert "ties head and embeddings, and the files hold two that differ" in message


@pytest.mark.usefixtures("on")
def test_the_plan_of_a_plain_export(export: Any) -> None:
    plan = plan_serving(export.folder, ServeOptions(default="two", port=0, kv_cache_gib=1))
    assert (plan.name, plan.base_name, plan.default) == ("tiny", "tiny-base", "two")
    assert option(plan, "--served-model-name") == "tiny-base"
    assert option(plan, "--dtype") == "float32"
    assert option(plan, "--quantization") == "cloq"
    assert option(plan, "--max-lora-rank") == "8"
    assert option(plan, "--max-loras") == "2"
    assert option(plan, "--max-model-len") == "256"
    start = plan.command.index("--lora-target-modules") + 1
    assert set(plan.command[start : start + 7]) == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    start = plan.command.index("--lora-modules") + 1
    named = {entry["name"]: entry["path"] for entry in map(json.loads, plan.command[start:])}
    assert named == {name: str(folder.resolve()) for name, folder in export.adapters.items()}
    assert plan.environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert plan.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert json.loads(plan.environment[POLICY_VARIABLE])["base_name"] == "tiny-base"
    assert json.loads(plan.environment[POLICY_VARIABLE])["default"] == "two"
    assert plan.port > 0
    assert "-m vllm.entrypoints.openai.api_server" in " ".join(plan.command)


def test_half_precision_on_a_gpu(export: Any, on: Callable[[EngineFacts], None]) -> None:
    on(EngineFacts("0.33.0", cuda=True))
    plan = plan_serving(export.folder, ServeOptions(default="one", port=0, kv_cache_gib=1))
    assert option(plan, "--dtype") == "float16"
    assert "--quantization" not in plan.command


@pytest.mark.usefixtures("on")
def test_a_base_without_adapters_is_served_under_its_own_name(write_export: Callable[..., Any]) -> None:
    made = write_export(QuantSpec(bits=2, group_size=32))
    for folder in made.adapters.values():
        for file in folder.iterdir():
            file.unlink()
    plan = plan_serving(made.folder, ServeOptions(port=0, kv_cache_gib=1))
    assert (plan.name, plan.base_name, plan.default) == ("tiny", "tiny", None)
    assert "--lora-modules" not in plan.command


def test_the_adapters_of_an_export_are_found(export: Any) -> None:
    assert served_adapters(export.folder) == export.adapters


@pytest.mark.usefixtures("on")
def test_what_is_refused(export: Any, write_export: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    folder, good = export.folder, export.adapters["one"]
    other = write_export(QuantSpec(bits=3, group_size=32)).adapters["one"]
    assert "there are 2 adapters, one, two; say which one" in refuse(folder)
    assert "the default adapter 'three' is not one of those served: one, two" in refuse(folder, default="three")
    assert "is not of the form NAME=FOLDER" in refuse(folder, adapters=("three",))
    assert "the adapter name 'a/b' has a slash" in refuse(folder, adapters=(f"a/b={good}",))
    assert "the adapter name 'a b' is not allowed" in refuse(folder, adapters=(f"a b={good}",))
    assert "the name 'one' is given twice" in refuse(folder, adapters=(f"one={good}",))
    assert "the name 'tiny' is given twice" in refuse(folder, adapters=(f"tiny={good}",), default="one")
    assert "the name 'tiny-base' is given twice" in refuse(folder, adapters=(f"tiny-base={good}",), default="one")
    assert "is bound to the base" in refuse(folder, adapters=(f"three={other}",), default="one")
    for nothing in (tmp_path, tmp_path / "none"):
        assert "is no adapter folder" in refuse(folder, adapters=(f"three={nothing}",), default="one")
    assert "vLLM takes 1, 8, 16" in refuse(folder, default="one", max_lora_rank=9)
    assert "has rank 4 at" in refuse(folder, default="one", max_lora_rank=1)
    assert "--port is set by cloq serve itself" in refuse(folder, default="one", engine_options=("--port=1",))
    assert "--served-model-name is set by" in refuse(folder, default="one", engine_options=("--served_model_name", "x"))
    assert "the model name 'a/b' has a slash" in refuse(folder, default="one", name="a/b")
    assert "`dtype` is 'int8'" in refuse(folder, default="one", dtype="int8")


@pytest.mark.usefixtures("on")
def test_a_folder_below_the_home_folder(export: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(export.folder))
    plan = plan_serving(
        export.folder, ServeOptions(adapters=("mine=~/adapters/one",), default="mine", port=0, kv_cache_gib=1)
    )
    assert plan.adapters["mine"] == export.adapters["one"]
    assert json.dumps({"name": "mine", "path": str(export.adapters["one"])}) in plan.command


@pytest.mark.usefixtures("on")
def test_adapters_that_do_not_fit_the_model(export: Any, tmp_path: pathlib.Path) -> None:
    pairs = dict(read_adapter(export.adapters["one"]).pairs)
    module = "model.layers.0.mlp.up_proj"
    cases = {
        "lacking": ({"model.layers.9.mlp.up_proj": pairs[module]}, "which is no linear layer of"),
        "shape": ({module: pairs["model.layers.0.mlp.down_proj"]}, "do not fit model.layers.0.mlp.up_proj"),
    }
    for name, (wrong, message) in cases.items():
        write_adapter(tmp_path / name, wrong, base_model="random", base_fingerprint=export.fingerprint)
        text = f"three={tmp_path / name}"
        assert message in refuse(export.folder, adapters=(text,), default="one")
    write_adapter(tmp_path / "other", pairs, base_model="random", base_fingerprint="sha256:0")
    plan = plan_serving(
        export.folder,
        ServeOptions(adapters=(f"three={tmp_path / 'other'}",), default="three", port=0, force=True, kv_cache_gib=1),
    )
    assert json.loads(plan.environment[POLICY_VARIABLE])["force"] is True


@pytest.mark.usefixtures("on")
def test_an_adapter_that_names_no_base_is_served_when_trusted_and_that_is_said(
    export: Any, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(export.adapters["one"], tmp_path / "plain")
    (tmp_path / "plain" / "cloq_adapter.json").unlink()
    weights = tmp_path / "plain" / "adapter_model.safetensors"
    write_safetensors(weights, read_safetensors(weights)[0])
    pairs = read_adapter(export.adapters["one"]).pairs
    write_adapter(tmp_path / "other", pairs, base_model="random", base_fingerprint="sha256:0")
    named = (f"plain={tmp_path / 'plain'}",)
    message = refuse(export.folder, adapters=named, default="plain")
    assert "does not say which quantized base it belongs to" in message
    options = ServeOptions(adapters=named, default="plain", port=0, kv_cache_gib=1, trust_adapters=True)
    plan = plan_serving(export.folder, options)
    assert json.loads(plan.environment[POLICY_VARIABLE])["trust_adapters"] is True
    assert unbound_notes(export.folder, plan) == [
        "the adapter plain does not say which quantized base it belongs to and was trusted; it is right only if it was "
        f"trained on {export.folder}"
    ]
    # Trust is no force.
    other = (f"other={tmp_path / 'other'}",)
    assert "is bound to the base" in refuse(export.folder, adapters=other, default="other", trust_adapters=True)


@pytest.mark.usefixtures("on")
def test_a_port_that_is_taken(export: Any) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(UsageError, match=rf"127\.0\.0\.1:{port} cannot be listened at \(Address already in use\)"):
            plan_serving(export.folder, ServeOptions(default="one", port=port, kv_cache_gib=1))


def test_ranks_and_names() -> None:
    assert [smallest_rank([rank]) for rank in (1, 2, 8, 60, 64, 65, 512)] == [1, 8, 8, 64, 64, 128, 512]
    with pytest.raises(UsageError, match="an adapter has rank 513; vLLM takes up to 512"):
        smallest_rank([8, 513])
    for name in ("a", "tiny-v1.2", "org:model_3"):
        check_name(name)
    for name in ("", ".hidden", "a\n", "x" * 200):
        with pytest.raises(UsageError, match="is not allowed"):
            check_name(name)


def test_a_folder_gives_the_model_its_name() -> None:
    names = {"plain-1.2": "plain-1.2", "my export (2 bits)": "my-export-2-bits-", ".hidden": "hidden", "…": "model"}
    assert {name: derived_name(pathlib.Path("/exports") / name) for name in names} == names


def test_an_environment_without_vllm(tmp_path: pathlib.Path) -> None:
    with pytest.raises(EngineError, match="cannot be started: No such file or directory; check `python`"):
        engine_facts(tmp_path / "python")
    bare = tmp_path / "bare"
    # Isolated and without site-packages: an environment that has nothing.
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(MissingPackageError, match=r"vLLM is not installed for .*bare; install vllm \(NVIDIA\)"):
        engine_facts(bare)


def test_the_verb_is_there_and_says_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    assert main(["serve", str(tmp_path / "none")]) == 1
    assert "does not exist; give a run directory or a checkpoint folder" in capsys.readouterr().err


def test_a_pair_of_larger_rank_raises_the_limit(export: Any, tmp_path: pathlib.Path, on: Any) -> None:
    pairs = {
        name: LoraPair(pair.lora_A.repeat(5, 1), pair.lora_B.repeat(1, 5), pair.alpha)
        for name, pair in read_adapter(export.adapters["one"]).pairs.items()
    }
    write_adapter(tmp_path / "wide", pairs, base_model="random", base_fingerprint=export.fingerprint)
    plan = plan_serving(
        export.folder,
        ServeOptions(adapters=(f"wide={tmp_path / 'wide'}",), default="wide", port=0, kv_cache_gib=1),
    )
    assert option(plan, "--max-lora-rank") == "64"


@pytest.mark.usefixtures("on")
def test_all_experts_are_adapted_by_one_name(mixture: Callable[..., Any]) -> None:
    plan = plan_serving(mixture("mixtral").folder, ServeOptions(port=0, default="one"))
    at = plan.command.index("--lora-target-modules") + 1
    assert list(plan.command[at : at + 5]) == ["experts", "k_proj", "o_proj", "q_proj", "v_proj"]


@pytest.mark.usefixtures("on")
def test_half_quantized_experts_are_not_served(mixture: Callable[..., Any]) -> None:
    export = mixture("qwen3-moe", overrides={"experts.3.up_proj": None})
    said = refuse(export.folder, default="one")
    assert "model.layers.1.mlp.experts.3.up_proj is not quantized; quantize all of them or none" in said


@pytest.mark.usefixtures("on")
def test_an_adapter_of_float_experts_is_not_served_on_a_cpu(
    mixture: Callable[..., Any], write_pairs: Callable[..., pathlib.Path], tmp_path: pathlib.Path, on: Any
) -> None:
    experts = {name: layer for name, layer in mixture("qwen3-moe").layers.items() if ".experts." in name}
    left_float = dict.fromkeys(("gate_proj", "up_proj", "down_proj"))
    export = mixture("qwen3-moe", overrides=left_float)
    assert not any(".experts." in name for name in export.layers)
    folder = write_pairs(tmp_path / "experts", experts, export.fingerprint, seed=1)
    named = {"adapters": (f"experts={folder}",), "default": "experts"}
    said = refuse(export.folder, **named)
    assert "adapts model.layers.1.mlp.experts.0.down_proj, but the experts of" in said
    assert "are not quantized, and on a CPU vLLM serves no adapters of such experts" in said
    on(EngineFacts("0.32.0", cuda=True))  # where vLLM itself does
    plan_serving(export.folder, ServeOptions(port=0, kv_cache_gib=1, **named))


@pytest.mark.usefixtures("on")
def test_what_a_default_is_proven_by(export: Any, write_export: Any, tmp_path: pathlib.Path) -> None:
    ids = [[3, 4, 5, 6], [7, 8]]
    probe = ProbeRecord.of(torch.float32, ids, [torch.arange(len(each) - 1.0) for each in ids])
    pairs = read_adapter(export.adapters["one"]).pairs

    def answer(fingerprint: str, notes: list[str], **options: Any) -> Any:
        noted = note_adapter("made", pairs, base_fingerprint=fingerprint, probe=probe)
        write_adapter(tmp_path / "made", pairs, base_model="random", base_fingerprint=fingerprint, extra=noted)
        asked = ServeOptions(adapters=(f"made={tmp_path / 'made'}",), default="made", port=0, kv_cache_gib=1, **options)
        return default_answer(export.folder, plan_serving(export.folder, asked), notes)

    notes: list[str] = []
    found = answer(export.fingerprint, notes)
    assert (found.adapter, found.recorded, found.limit, found.base_answers, notes) == ("made", probe, 1e-2, True, [])
    assert found.token_ids == ids
    assert set(found.pairs) == set(pairs)
    assert answer(export.fingerprint, notes, dtype="bfloat16").limit == 0.1
    # Cut to what the server takes, with a place for the answer.
    short = answer(export.fingerprint, notes, max_model_len=3)
    assert short.token_ids == [[3, 4], [7, 8]]
    assert short.recorded.logprobs == ((0.0,), (0.0,))
    with pytest.raises(UsageError, match="a proof needs texts of two tokens and an answer; serve with a larger `max_"):
        answer(export.fingerprint, notes, max_model_len=2)
    # Forced onto another base: what was recorded of it there says nothing here, and the package's own texts are taken.
    forced = answer("sha256:0", notes, force=True)
    assert forced.recorded is None
    assert len(forced.token_ids) == 4
    side = tmp_path / "made" / "cloq_adapter.json"
    answer(export.fingerprint, notes)
    side.write_text(side.read_text().replace('"name": "made"', '"name": "edited"'))
    asked = ServeOptions(adapters=(f"made={tmp_path / 'made'}",), default="made", port=0, kv_cache_gib=1)
    assert default_answer(export.folder, plan_serving(export.folder, asked), notes).recorded is None
    assert len(notes) == 1
    assert "the record of provenance was edited after it was written" in notes[0]


@pytest.mark.usefixtures("on")
def test_a_base_alone_is_proven_too(write_export: Callable[..., Any]) -> None:
    made = write_export(QuantSpec(bits=3, group_size=32))
    shutil.rmtree(made.folder / "adapters")
    found = default_answer(made.folder, plan_serving(made.folder, ServeOptions(port=0, kv_cache_gib=1)), [])
    assert (found.adapter, dict(found.pairs), found.recorded, found.limit) == (None, {}, None, 1e-3)
