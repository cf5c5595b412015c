"""Engines that are wrong in one thing each, from scales to batches, and the gate that names each of them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from faulty_engine import changed_models, each_score, each_text, named_module, scoring, writing
from gate_subjects import SILENT, write_word_tokenizer
from tiers import slow_but

from cloq_export.engines.protocol import ServedModel
from cloq_export.engines.transformers.reference import reference_model
from cloq_export.engines.transformers.served import packed_model
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.files.tensor_writer import write_safetensors
from cloq_export.parity.report import ParityReport, missed_gates
from cloq_export.parity.scales import SCALE_LIMIT, ServedWindow, measure_scales, share_windows
from cloq_export.recipe import Recipe
from cloq_export.verbs.adapt import adapt
from cloq_export.verbs.export import export as write_export
from cloq_export.verbs.options import ExportOptions
from cloq_export.verbs.run import run as make_run
from cloq_export.verbs.verification import engines
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verify import verify

BITS = 2
CONTEXT = 64
# A window of the text ends here; only the longest text goes on.
SEEN = 24
WORDS = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(61))]


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
    model.save_pretrained(folder)
    write_word_tokenizer(folder, WORDS)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    generator = torch.Generator().manual_seed(3)
    drawn = (61 * torch.rand(1200, generator=generator).pow(2)).long()
    path.write_text(" ".join(f"w{int(number)}" for number in drawn))
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, float_folder: Path, text: Path) -> Path:
    run = tmp_path_factory.mktemp("faults") / "run"
    small = {"group_size": 16, "rank": 4, "samples": 4, "seqlen": 32, "precision": "float32", "eval_windows": 2}
    texts = {"calibration": str(text), "eval_text": str(text), "eval_window": 16, "error_aware": 0.0}
    recipe = Recipe.from_mapping({"model": str(float_folder), "bits": BITS, **small, **texts})
    make_run(recipe, run, console=SILENT)
    adapt(run, {"rank": 6, "adapter_name": "second", "split": "balanced"}, console=SILENT)
    write_export(run, ExportOptions(format="gptq_v2", out=run / "exports" / "e"), console=SILENT)
    return run / "exports" / "e"


@pytest.fixture
def options(float_folder: Path, text: Path) -> VerifyOptions:
    return VerifyOptions(
        str(float_folder), text=str(text), window=SEEN, windows=4, prompts=4, new_tokens=8, liveness_tokens=SEEN
    )


def beyond(place: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda values: torch.cat([values[:place], change(values[place:])])


def is_mixed(names: Sequence[str | None]) -> bool:
    return len(set(names)) > 1


def other_name(name: str | None) -> str | None:
    return {"second": "cloq", "cloq": "second", None: None}[name]


def rounded_inputs(model: Any, _: str | None) -> None:
    def hook(_module: Any, inputs: Any) -> Any:
        step = inputs[0].abs().amax(-1, keepdim=True) / 127
        return ((inputs[0] / step).round() * step, *inputs[1:])

    for name, module in model.named_modules():
        if name.endswith(("mlp", "self_attn", "norm")) and not name.endswith("self_attn"):
            module.register_forward_pre_hook(hook)


def other_angles(model: Any, _: str | None) -> None:
    rotary = named_module(model, "rotary_emb")
    rotary.inv_freq = rotary.inv_freq * 1.02


def other_epsilon(model: Any, _: str | None) -> None:
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.variance_epsilon = 1e-2


def other_pair(field: str, factor: float) -> Callable[[Any, str | None], None]:
    def change(model: Any, name: str | None) -> None:
        if name == "second":
            weight = getattr(named_module(model, "0.self_attn.v_proj"), field)["default"].weight
            weight.data.mul_(factor)

    return change


def all_pairs(factor: float) -> Callable[[Any, str | None], None]:
    def change(model: Any, _: str | None) -> None:
        for module_name, module in model.named_modules():
            if ".lora_B" in module_name and hasattr(module, "weight"):
                module.weight.data.mul_(factor)

    return change


def sampled(engine: Any, ids: Any, names: Any, new: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    texts = []
    for prompt, name in zip(ids, names, strict=True):
        text: list[int] = []
        with torch.no_grad():
            for _ in range(new):
                logits = engine.model(name)(input_ids=torch.tensor([[*prompt, *text]])).logits[0, -1]
                text.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
        texts.append(text)
    return texts


def swapped_first_two(answers: list[Any]) -> list[Any]:
    return [answers[1], answers[0], *answers[2:]] if len(answers) > 1 else answers


def stale_cache(engine: Any, ids: Any, names: Any, new: int) -> list[list[int]]:
    """The keys of the first token of each prompt are those of another prompt's."""
    return engine.generate([[(ids[0][0] + 7) % 64, *prompt[1:]] for prompt in ids], names, new)


def only_mixed(change: Callable[[Any, Any, Any, int], Any]) -> Callable[[Any, Any, Any, int], Any]:
    return lambda engine, ids, names, new: (
        change(engine, ids, names, new) if is_mixed(names) else engine.generate(ids, names, new)
    )


def only_long(change: Callable[[list[int]], list[int]]) -> Callable[[Any, Any, Any, int], Any]:
    """Change the prompts that are longer than any window."""

    def write(engine: Any, ids: Any, names: Any, new: int) -> list[list[int]]:
        return engine.generate([change(list(each)) if len(each) > 40 else each for each in ids], names, new)

    return write


FAULTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    # scores of one forward pass
    "wrong beyond a position": (each_score(beyond(40, lambda v: v - 0.3)), "longest_difference_max"),
    "NaN beyond a position": (each_score(beyond(40, lambda v: v * torch.nan)), "longest_difference_max"),
    "one token wrong at the very end": (each_score(beyond(CONTEXT - 2, lambda v: v - 1)), "longest_difference_max"),
    "scores only part of a long text": (each_score(lambda v: v[:50]), "longest_difference_max"),
    "a temperature of 1.01": (each_score(lambda v: v * 1.01), "logprob_difference_max"),
    "scores shifted by one": (each_score(lambda v: v.roll(1)), "logprob_difference_max"),
    "scores without the first token": (each_score(lambda v: v[1:]), "logprob_difference_max"),
    "answers of two requests exchanged": (
        scoring(lambda engine, ids, names: swapped_first_two(engine.prompt_logprobs(ids, names))),
        "logprob_difference_max",
    ),
    "drops the last request": (
        scoring(lambda engine, ids, names: engine.prompt_logprobs(ids, names)[:-1]),
        "logprob_difference_max",
    ),
    "keeps the first forty tokens of a text in mind": (
        scoring(
            lambda engine, ids, names: engine.prompt_logprobs(
                [[*each[:40], *([each[0]] * (len(each) - 40))] for each in ids], names
            )
        ),
        "longest_difference_max",
    ),
    # batches
    "adapter number off by one": (
        scoring(lambda engine, ids, names: engine.prompt_logprobs(ids, [other_name(name) for name in names])),
        "logprob_difference_max",
    ),
    "the adapters are not applied": (
        scoring(lambda engine, ids, names: engine.prompt_logprobs(ids, [None] * len(ids))),
        "live_modules",
    ),
    "one adapter for a whole mixed batch": (
        scoring(lambda engine, ids, names: engine.prompt_logprobs(ids, [names[-1]] * len(ids))),
        "mixed_batch_difference_max",
    ),
    "adapters exchanged in mixed batches": (
        scoring(
            lambda engine, ids, names: engine.prompt_logprobs(
                ids, [other_name(name) if is_mixed(names) else name for name in names]
            )
        ),
        "mixed_batch_difference_max",
    ),
    "the shorter texts of a batch are off": (
        scoring(
            lambda engine, ids, names: [
                values - 0.02 if len(each) < max(map(len, ids)) else values
                for each, values in zip(ids, engine.prompt_logprobs(ids, names), strict=True)
            ]
        ),
        "mixed_batch_difference_max",
    ),
    "writes with the second adapter exchanged in mixed batches": (
        writing(
            only_mixed(
                lambda engine, ids, names, new: engine.generate(
                    ids, ["cloq" if name == "second" else name for name in names], new
                )
            )
        ),
        "mixed_decode_gap_max",
    ),
    "writes base requests with an adapter in mixed batches": (
        writing(
            only_mixed(lambda engine, ids, names, new: engine.generate(ids, [name or "cloq" for name in names], new))
        ),
        "mixed_decode_gap_max",
    ),
    "texts exchanged in mixed batches": (
        writing(only_mixed(lambda engine, ids, names, new: swapped_first_two(engine.generate(ids, names, new)))),
        "mixed_decode_gap_max",
    ),
    "one text is lost in mixed batches": (
        writing(only_mixed(lambda engine, ids, names, new: engine.generate(ids, names, new)[1:])),
        "mixed_decode_gap_max",
    ),
    "batches of two are off": (
        scoring(
            lambda engine, ids, names: [
                values - 0.05 if len(ids) == 2 else values for values in engine.prompt_logprobs(ids, names)
            ]
        ),
        "logprob_difference_max",
    ),
    # decode steps
    "what fills up shorter prompts of a batch is read": (
        writing(
            lambda engine, ids, names, new: engine.generate(
                [[0] * (max(map(len, ids)) - len(each)) + list(each) for each in ids], names, new
            )
        ),
        "decode_gap_max",
    ),
    "decode steps write the next token of the list": (
        each_text(lambda text: [*text[:1], *((token + 1) % 64 for token in text[1:])]),
        "decode_gap_max",
    ),
    "the last decode step is wrong": (each_text(lambda text: [*text[:-1], (text[-1] + 5) % 64]), "decode_gap_max"),
    "texts are cut short": (each_text(lambda text: text[:3]), "decode_gap_max"),
    "an end of text comes early": (each_text(lambda text: [*text[:2], 2]), "decode_gap_max"),
    "writes more than was asked for": (each_text(lambda text: [*text, 5]), "decode_gap_max"),
    "writes a token that does not exist": (each_text(lambda text: [*text[:-1], 999]), "decode_gap_max"),
    "writes nothing": (each_text(lambda text: []), "decode_gap_max"),
    "repeats its first token": (each_text(lambda text: text[:1] * len(text)), "decode_gap_max"),
    "texts of two prompts exchanged": (
        writing(lambda engine, ids, names, new: swapped_first_two(engine.generate(ids, names, new))),
        "decode_gap_max",
    ),
    "samples": (writing(sampled), "decode_gap_max"),
    "prompts are truncated": (
        writing(lambda engine, ids, names, new: engine.generate([each[-4:] for each in ids], names, new)),
        "decode_gap_max",
    ),
    "the last token of a prompt is lost": (
        writing(lambda engine, ids, names, new: engine.generate([each[:-1] for each in ids], names, new)),
        "decode_gap_max",
    ),
    "another prompt's keys lie in the cache": (writing(stale_cache), "decode_gap_max"),
    "long prompts are truncated": (writing(only_long(lambda prompt: prompt[-8:])), "decode_gap_max"),
    "long prompts lose their last token": (writing(only_long(lambda prompt: prompt[:-1])), "decode_gap_max"),
    "writes without the adapters": (
        writing(lambda engine, ids, names, new: engine.generate(ids, [None] * len(ids), new)),
        "decode_gap_max",
    ),
    # the base without its adapters
    "the base's own scores are off": (
        scoring(
            lambda engine, ids, names: [
                values if name else values - 0.05
                for values, name in zip(engine.prompt_logprobs(ids, names), names, strict=True)
            ]
        ),
        "logprob_difference_max",
    ),
    "the base's own scores are off beyond a position": (
        scoring(
            lambda engine, ids, names: [
                values if name else beyond(40, lambda v: v - 0.3)(values)
                for values, name in zip(engine.prompt_logprobs(ids, names), names, strict=True)
            ]
        ),
        "longest_difference_max",
    ),
    # inside the model
    "activations in int8": (changed_models(rounded_inputs), "logprob_difference_max"),
    "other rotary angles": (changed_models(other_angles), "logprob_difference_max"),
    "another epsilon in the norms": (changed_models(other_epsilon), "logprob_difference_max"),
    "a module of one adapter is ignored": (changed_models(other_pair("lora_B", 0.0)), "live_modules"),
    "a module of one adapter is doubled": (changed_models(other_pair("lora_A", 2.0)), "logprob_difference_max"),
    "alpha is doubled": (changed_models(all_pairs(2.0)), "live_modules"),
    "alpha has another sign": (changed_models(all_pairs(-1.0)), "live_modules"),
}


def healthy(engine: ServedModel) -> ServedModel:
    return engine


def served_by(kind: Callable[[Any], Any], export: Path | None = None, **more: Any) -> Callable[..., ServedModel]:
    def opener(own: Path, adapters: Mapping[str, Path], options: VerifyOptions) -> ServedModel:
        return kind(packed_model(export or own, adapters, dtype=engines.DTYPES[options.dtype], **more))

    return opener


def missed(report: ParityReport) -> set[str]:
    return {verdict.gate for verdict in report.gates if not verdict.passed}


@pytest.mark.parametrize(
    "fault",
    slow_but(
        FAULTS,
        *("wrong beyond a position", "a temperature of 1.01", "scores without the first token"),
        *("the adapters are not applied", "one adapter for a whole mixed batch", "batches of two are off"),
        *("texts exchanged in mixed batches", "what fills up shorter prompts of a batch is read"),
        *("the last decode step is wrong", "writes nothing", "samples", "long prompts are truncated"),
        *("the base's own scores are off", "other rotary angles", "a module of one adapter is ignored"),
    ),
)
def test_a_faulty_engine_is_named(
    exported: Path, options: VerifyOptions, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    kind, gate = FAULTS[fault]
    monkeypatch.setitem(engines.OPENERS, "hf", served_by(kind))
    report = verify(exported, options, console=SILENT)
    assert gate in missed(report)
    assert not report.passed


def test_each_fault_is_named_by_its_own_gate_alone(
    exported: Path, options: VerifyOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fault in ("wrong beyond a position", "texts exchanged in mixed batches", "long prompts are truncated"):
        kind, gate = FAULTS[fault]
        monkeypatch.setitem(engines.OPENERS, "hf", served_by(kind))
        assert missed(verify(exported, options, console=SILENT)) == {gate}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_healthy_engine_passes(exported: Path, options: VerifyOptions, dtype: str) -> None:
    report = verify(exported, dataclasses.replace(options, dtype=dtype, windows=16), console=SILENT)
    assert missed(report) == set()
    assert report.passed
    assert report.conditions.longest == CONTEXT
    kinds = [(row.kind, row.adapter) for row in report.decoding]
    assert kinds == [
        *((kind, name) for name in ("cloq", "second") for kind in ("longest", "greedy")),
        *(("mixed", name) for name in (None, "cloq", "second")),
    ]
    assert report.scales.modules == len(report.scales.found) == 7


def with_changed(folder: Path, export: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Return a copy of an export in which tensors are changed, as an engine reads them wrongly."""
    copy = Path(shutil.copytree(export, folder / "changed"))
    tensors, metadata = read_safetensors(copy / "model.safetensors")
    held = {name: tensor.clone() for name, tensor in tensors.items()}
    change(held)
    write_safetensors(copy / "model.safetensors", held, metadata)
    return copy


def scaled(module: str, factor: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(held: dict[str, torch.Tensor]) -> None:
        held[f"{module}.scales"] = (held[f"{module}.scales"].float() * factor).half()

    return change


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("module", ["0.mlp.down_proj", "0.self_attn.v_proj"])
def test_one_hundredth_of_a_scale_is_found_at_two_bits(
    tmp_path: Path, exported: Path, options: VerifyOptions, monkeypatch: pytest.MonkeyPatch, module: str, dtype: str
) -> None:
    name = f"model.layers.{module}"
    copy = with_changed(tmp_path, exported, scaled(name, 1.01))
    monkeypatch.setitem(engines.OPENERS, "hf", served_by(healthy, copy, force=True))
    report = verify(exported, dataclasses.replace(options, dtype=dtype, windows=40), console=SILENT)
    assert "scale_error_max" in missed(report)
    worst = report.scales.candidates[0]
    # v and o scale the same.
    assert worst.module in (name, name.replace("v_proj", "o_proj"))
    assert worst.error == pytest.approx(0.01, abs=0.003)
    assert f"the scale of {worst.module} is off by +" in str(missed_gates(report))


@pytest.mark.parametrize(
    ("module", "factor"),
    [
        *(("mlp.down_proj", 1.01), ("self_attn.q_proj", 0.99)),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                *(("mlp.up_proj", 0.99), ("mlp.gate_proj", 1.01), ("self_attn.v_proj", 0.99)),
                *(("self_attn.o_proj", 1.01), ("self_attn.k_proj", 1.01)),
            )
        ),
    ],
)
def test_one_hundredth_of_a_scale_is_found_in_bfloat16_on_the_tokens_that_it_takes(
    tmp_path: Path,
    exported: Path,
    options: VerifyOptions,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    factor: float,
) -> None:
    name = f"model.layers.0.{module}"
    copy = with_changed(tmp_path, exported, scaled(name, factor))
    generator = torch.Generator().manual_seed(4)
    drawn = (61 * torch.rand(4200, generator=generator).pow(2)).long()
    (tmp_path / "long.txt").write_text(" ".join(f"w{int(number)}" for number in drawn))
    monkeypatch.setitem(engines.OPENERS, "hf", served_by(healthy, copy, force=True))
    asked = dataclasses.replace(
        options, dtype="bfloat16", text=str(tmp_path / "long.txt"), windows=90, window=CONTEXT - 20, adapters=("cloq",)
    )
    report = verify(exported, asked, console=SILENT)
    assert "scale_error_max" in missed(report)
    worst = report.scales.candidates[0]
    # q and k scale the same, v and o too, and through what is left of an activation also gate, up and down.
    assert worst.module.rpartition(".")[0] == name.rpartition(".")[0]
    assert worst.error == pytest.approx(factor - 1, abs=0.005)
    assert 0 < report.scales.rounding_shared <= 1
    assert max(report.scales.found.values()) < 0.01


def test_a_zero_that_is_off_by_one_in_one_group_is_found(
    tmp_path: Path, exported: Path, options: VerifyOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(held: dict[str, torch.Tensor]) -> None:
        held["model.layers.0.mlp.up_proj.qzeros"][0, 0] ^= 1

    copy = with_changed(tmp_path, exported, change)
    monkeypatch.setitem(engines.OPENERS, "hf", served_by(healthy, copy, force=True))
    assert "logprob_difference_max" in missed(verify(exported, options, console=SILENT))


def served_windows(
    windows: Sequence[Sequence[int]], names: Sequence[str | None], served: Any, expected: Any
) -> list[ServedWindow]:
    return [ServedWindow.of_next(*each) for each in zip(windows, names, served, expected, strict=True)]


def test_scales_of_healthy_runtimes_show_no_error(exported: Path, text: Path) -> None:
    ids = [WORDS.index(word) for word in text.read_text().split()]
    windows = [ids[start : start + 48] for start in range(0, 1152, 48)]
    adapters = {"cloq": exported / "adapters" / "cloq"}
    reference = reference_model(exported, adapters)
    names = ["cloq", None] * (len(windows) // 2)
    expected = reference.prompt_logprobs(windows, names)
    modules = sorted(path for path in reference.model("cloq").state_dict() if path.endswith("base_layer.weight"))
    modules = [path.removesuffix(".base_layer.weight") for path in modules]
    assert len(modules) == 7
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        served = packed_model(exported, adapters, dtype=dtype).prompt_logprobs(windows, names)
        measured = served_windows(windows, names, served, expected)
        found = measure_scales(reference, measured, modules, screened=32, limit=SCALE_LIMIT, seed=1)
        assert found.largest < SCALE_LIMIT
        assert found.unseen == ()
        assert set(found.found) == set(modules)
    name = "model.layers.0.mlp.up_proj"
    with reference.scaled("cloq", name, 1.02), reference.scaled(None, name, 1.02):
        wrong = reference.prompt_logprobs(windows, names)
    measured = served_windows(windows, names, wrong, expected)
    found = measure_scales(reference, measured, modules, screened=32, limit=SCALE_LIMIT)
    assert found.candidates[0].module == name
    assert found.largest == pytest.approx(0.02, abs=0.002)


@pytest.mark.parametrize("path", ["cloq", None])
def test_a_scale_that_is_wrong_with_one_adapter_alone_is_found(exported: Path, text: Path, path: str | None) -> None:
    ids = [WORDS.index(word) for word in text.read_text().split()]
    windows = [ids[start : start + 48] for start in range(0, 1152, 48)]
    reference = reference_model(exported, {name: exported / "adapters" / name for name in ("cloq", "second")})
    names = ["cloq", "second", None] * (len(windows) // 3)
    expected = reference.prompt_logprobs(windows, names)
    modules = [f"model.layers.0.mlp.{name}_proj" for name in ("up", "gate", "down")]
    with reference.scaled(path, modules[2], 1.01):
        wrong = reference.prompt_logprobs(windows, names)
    measured = served_windows(windows, names, wrong, expected)
    found = measure_scales(reference, measured, modules, screened=32, limit=SCALE_LIMIT)
    assert (found.candidates[0].module, found.candidates[0].adapters) == (modules[2], (path,))
    assert found.largest == pytest.approx(0.01, abs=0.002)


@pytest.mark.parametrize(
    ("windows", "window", "subjects", "length", "pieces"),
    [
        (16, 512, 1, 512, [(0, 0), (1, 0)]),
        (16, 512, 2, 512, [(0, 0), (1, 1)]),
        (16, 512, 4, 256, [(0, 0), (1, 1), (2, 2), (3, 3)]),
        (1, 512, 3, 341, [(0, 0), (0, 1), (0, 2)]),
        (2, 24, 1, 24, [(0, 0), (1, 0)]),
    ],
)
def test_the_budget_of_tokens_is_shared_out(
    windows: int, window: int, subjects: int, length: int, pieces: list[tuple[int, int]]
) -> None:
    assert share_windows(windows, 1024, window, subjects) == (length, pieces)


def test_too_few_tokens_say_nothing_of_scales(exported: Path) -> None:
    window = ServedWindow.of_next([3, 4], None, torch.ones(1), torch.ones(1))
    found = measure_scales(reference_model(exported, {}), [window], ["model.layers.0.mlp.up_proj"], screened=2, limit=1)
    assert found.largest is None
