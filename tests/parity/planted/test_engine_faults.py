"""Engines that are wrong in one thing each, from scores to batches, and the gate that names each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_engine import changed_models, each_score, each_text, named_module, scoring, writing
from gate_subjects import SILENT
from parity_reports import missed
from served_exports import CONTEXT, served_by
from tiers import slow_but

from cloq_export.verbs.verification import engines
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verify import verify


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
