"""Faults of engines that serve a healthy export, and of what is asked of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from faulty_engine import DIFFERENCE, GAP, LIVE, LONGEST, MIXED_GAP, MIXED_SCORES, SCALE, each_text, writing
from gate_subjects import CONTEXT
from planted_models import MODELS
from planted_scene import Fault, Scene
from planted_scores import SCORES


def _stepwise(inner: Any, ids: Any, names: Any, new: int, choose: Callable[..., int]) -> list[list[int]]:
    """Write token by token: choose(logits of the last place, text so far, prompt) -> token."""
    texts = []
    for prompt, name in zip(ids, names, strict=True):
        text: list[int] = []
        with torch.no_grad():
            while len(text) < new and 2 not in text:
                logits = inner.model(name)(input_ids=torch.tensor([[*prompt, *text]])).logits[0, -1]
                text.append(choose(logits, text, prompt))
        texts.append(text)
    return texts


def _stepping(choose: Callable[..., int]) -> Callable[[Any], Any]:
    return writing(lambda inner, ids, names, new: _stepwise(inner, ids, names, new, choose))


def _penalty(logits: Any, text: list[int], prompt: Sequence[int]) -> int:
    seen = list({*text, *prompt})
    logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 1.3, logits[seen] * 1.3)
    return int(logits.argmax())


def _second_of_two(logits: Any, text: list[int], _: Any) -> int:
    return int(logits.topk(2).indices[len(text) % 2])


def _without_end(logits: Any, text: list[int], _: Any) -> int:
    logits[2] = -math.inf
    return int(logits.argmax())


def _adapter_in_prefill_alone(inner: Any, ids: Any, names: Any, new: int) -> list[list[int]]:
    first = inner.generate(ids, names, 1)
    rest = inner.generate(
        [[*prompt, *text] for prompt, text in zip(ids, first, strict=True)], [None] * len(ids), new - 1
    )
    return [[*a, *b][:new] for a, b in zip(first, rest, strict=True)]


def _window_in_steps(inner: Any, ids: Any, names: Any, new: int) -> list[list[int]]:
    """Behind the first token, steps look at the last eight tokens alone."""
    texts = []
    for prompt, name in zip(ids, names, strict=True):
        text = list(inner.generate([prompt], [name], 1)[0])
        while len(text) < new and 2 not in text:
            text += inner.generate([[*prompt, *text][-8:]], [name], 1)[0]
        texts.append(text)
    return texts


def _context_lost(inner: Any, ids: Any, names: Any, new: int) -> list[list[int]]:
    """The token that was written last is not in the cache yet when the next one is computed."""
    texts = []
    for prompt, name in zip(ids, names, strict=True):
        text = list(inner.generate([prompt], [name], 1)[0])
        while len(text) < new and 2 not in text:
            text += inner.generate([[*prompt, *text[:-1]]], [name], 1)[0]
        texts.append(text)
    return texts


def _padding_read(inner: Any, ids: Any, names: Any, new: int) -> list[list[int]]:
    """Shorter prompts of a batch are filled up on their left, and what fills them is read."""
    width = max(map(len, ids), default=0)
    return inner.generate([[0] * (width - len(prompt)) + list(prompt) for prompt in ids], names, new)


def _only_first_prompt(inner: Any, ids: Any, names: Any, new: int) -> list[list[int]]:
    return [list(inner.generate(ids[:1], names[:1], new)[0])] * len(ids)


def _mixed(change: Callable[[Sequence[str | None]], list[str | None]]) -> Callable[[Any], Any]:
    def write(inner: Any, ids: Any, names: Any, new: int) -> Any:
        return inner.generate(ids, change(names) if len(set(names)) > 1 else names, new)

    return writing(write)


def _gate(text: str, **more: Any) -> Callable[[Scene], Mapping[str, Any]]:
    def plant(scene: Scene) -> Mapping[str, Any]:
        path = scene.place / "gate.yaml"
        path.write_text(text, encoding="utf-8")
        return {"gate": path, **more}

    return plant


def _questions(scene: Scene, rows: Sequence[int], **more: Any) -> Mapping[str, Any]:
    path = scene.place / "piqa.jsonl"
    made = [{"goal": f"w{n} w{n + 1}", "sol1": f"w{n + 1} w3", "sol2": f"w{n + 30} w7", "label": n % 2} for n in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return {"tasks": (f"piqa={path}",), **more}


def _same_choices(scene: Scene) -> Mapping[str, Any]:
    path = scene.place / "piqa.jsonl"
    made = [{"goal": f"w{n} w{n + 1}", "sol1": "w3 w4", "sol2": "w3 w4", "label": n % 2} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return {"tasks": (f"piqa={path}",)}


def _short_text(scene: Scene) -> Mapping[str, Any]:
    path = Path(scene.place / "short.txt")
    path.write_text("w1 w2 w3 w4", encoding="utf-8")
    return {"text": str(path)}


TEXTS = [
    Fault("a repetition penalty", GAP, serve=_stepping(_penalty)),
    Fault("every other token is the second best", GAP, serve=_stepping(_second_of_two)),
    Fault("the adapter in the first token alone", GAP, serve=writing(_adapter_in_prefill_alone)),
    Fault("steps see eight tokens", GAP, serve=writing(_window_in_steps)),
    Fault("steps do not see the last token", GAP, serve=writing(_context_lost)),
    Fault("padding of shorter prompts is read", GAP, serve=writing(_padding_read)),
    Fault("all texts are the first prompt's", GAP, serve=writing(_only_first_prompt)),
    Fault(
        "a begin token before prompts",
        GAP,
        serve=writing(lambda e, ids, names, new: e.generate([[1, *each] for each in ids], names, new)),
    ),
    Fault(
        "prompts written backwards",
        GAP,
        serve=writing(lambda e, ids, names, new: e.generate([each[::-1] for each in ids], names, new)),
    ),
    Fault("one token too few", GAP, serve=each_text(lambda text: text[:-1])),
    Fault("the text begins with its second token", GAP, serve=each_text(lambda text: [*text[1:], text[0]])),
    Fault(
        "the prompt's last token comes again",
        GAP,
        serve=writing(
            lambda e, ids, names, new: [
                [p[-1], *t][:new] for p, t in zip(ids, e.generate(ids, names, new), strict=True)
            ]
        ),
    ),
    Fault(
        "one token in the middle is wrong",
        GAP,
        serve=each_text(lambda text: [*text[:3], (text[3] + 1) % 90, *text[4:]] if len(text) > 4 else [7] * 5),
    ),
    Fault("negative tokens", GAP, serve=each_text(lambda text: [-1, *text[1:]])),
    Fault(
        "base requests of mixed batches are dropped to an adapter",
        MIXED_GAP,
        serve=_mixed(lambda names: [name or "two" for name in names]),
    ),
    Fault("adapters of mixed batches lost", MIXED_GAP, serve=_mixed(lambda names: [None for _ in names])),
    Fault(
        "adapters of mixed batches shifted by one request",
        MIXED_GAP,
        serve=_mixed(lambda names: [*names[1:], names[0]]),
    ),
]
EVALUATION = [
    Fault(
        "limits dropped",
        "judged",
        "every limit",
        _gate(
            "\n".join(
                f"{name}: null"
                for name in (
                    "certificate",
                    "provenance",
                    "reference",
                    "float_part",
                    "last_step_difference_mean",
                    DIFFERENCE,
                    LONGEST,
                    SCALE,
                    "perplexity_over_recorded",
                    "greedy_flips",
                    GAP,
                    LIVE,
                    MIXED_SCORES,
                    MIXED_GAP,
                )
            )
        ),
    ),
    Fault("no prompts", "judged", "`prompts=0`", lambda scene: {"prompts": 0}),
    Fault("a text shorter than a window", "judged", "nothing was judged", _short_text),
    Fault("a longest text beyond the model", "judged", str(CONTEXT), lambda scene: {"longest": 10 * CONTEXT}),
    Fault("texts of one token", "judged", "new_tokens", lambda scene: {"new_tokens": 1}),
    Fault("choices that are all the same", "piqa_p_value", "0 questions", _same_choices),
    Fault("few questions", "piqa_p_value", "piqa", lambda scene: _questions(scene, range(5))),
    Fault(
        "fewer questions than asked for",
        "piqa_questions_missing",
        "",
        lambda scene: _questions(scene, range(12), problems=20),
    ),
    Fault("questions that repeat", "piqa_questions_repeated", "", lambda scene: _questions(scene, [*range(12), 3, 4])),
    Fault("a limit on what nobody measures", "judged", "not measured", _gate("scale_eror_max: 0.1")),
    Fault("a limit that is no number", "judged", "a number is needed", _gate("greedy_flips: few")),
    Fault("a limit that stands twice", "judged", "twice", _gate("greedy_flips: 0\ngreedy_flips: 9")),
]
FAULTS = [*SCORES, *MODELS, *TEXTS, *EVALUATION]
