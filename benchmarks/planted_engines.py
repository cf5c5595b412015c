"""Faults of engines that serve a healthy export, and of what is asked of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gate_subjects import CONTEXT
from planted_scene import Fault, Scene, edit_tensors

Scores = Callable[[Any, Any, Any], Any]
Writes = Callable[[Any, Any, Any, int], Any]


class Engine:
    """A healthy runtime behind two places where something can go wrong.

    Args:
        inner: the healthy runtime.
        scores: (runtime, token ids, adapters) -> log-probabilities.
        writes: (runtime, prompts, adapters, tokens) -> texts.
    """

    def __init__(self, inner: Any, scores: Scores | None = None, writes: Writes | None = None) -> None:
        self._inner, self._scores, self._writes = inner, scores, writes

    def prompt_logprobs(self, token_ids: Any, adapters: Any) -> Any:
        """Return the answers of the runtime, changed."""
        ask = self._scores or (lambda inner, ids, names: inner.prompt_logprobs(ids, names))
        return ask(self._inner, token_ids, adapters)

    def generate(self, token_ids: Any, adapters: Any, max_new_tokens: int) -> Any:
        """Return the texts of the runtime, changed."""
        ask = self._writes or (lambda inner, ids, names, new: inner.generate(ids, names, new))
        return ask(self._inner, token_ids, adapters, max_new_tokens)

    def __getattr__(self, name: str) -> Any:
        """Hand on everything else."""
        return getattr(self._inner, name)


def _scoring(change: Scores) -> Callable[[Any], Any]:
    return lambda inner: Engine(inner, scores=change)


def _writing(change: Writes) -> Callable[[Any], Any]:
    return lambda inner: Engine(inner, writes=change)


def _each(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    return _scoring(lambda inner, ids, names: [change(values.clone()) for values in inner.prompt_logprobs(ids, names)])


def _each_text(change: Callable[[list[int]], list[int]]) -> Callable[[Any], Any]:
    return _writing(lambda inner, ids, names, new: [change(list(text)) for text in inner.generate(ids, names, new)])


def _models(change: Callable[[Any, str | None], None]) -> Callable[[Any], Any]:
    """Change the models of the runtime when they are loaded: (model, adapter)."""

    def serve(inner: Any) -> Any:
        load = inner._load_model

        def load_changed(name: str | None) -> Any:
            model = load(name)
            change(model, name)
            return model

        inner._load_model = load_changed
        return inner

    return serve


def _named(model: Any, ending: str) -> Any:
    return next(module for name, module in model.named_modules() if name.endswith(ending))


def _base(model: Any, ending: str) -> Any:
    """Return a packed linear, whether an adapter wraps it or not."""
    module = _named(model, ending)
    return getattr(module, "base_layer", module)


def _output(ending: str, change: Callable[[Any], Any], only: Callable[[str | None], bool] = lambda name: True) -> Any:
    """Change what a quantized module puts out, the adapter beside it left alone."""

    def hooked(model: Any, name: str | None) -> None:
        module = _base(model, ending)
        # A base that several models share is hooked once.
        if only(name) and not getattr(module, "_planted", False):
            module._planted = True
            module.register_forward_hook(lambda _module, _inputs, output: change(output))

    return _models(hooked)


def _scale_read(ending: str, factor: float) -> Callable[[Path], None]:
    """Read the scales of one module off by a factor."""

    def misread(export: Path) -> None:
        def change(held: dict[str, Any]) -> None:
            name = f"model.layers.{ending}.scales"
            held[name] = (held[name].float() * factor).to(held[name].dtype)

        edit_tensors(export / "model.safetensors", change)

    return misread


def _block(ending: str) -> str:
    """Return what must be said: q and k scale the same, v and o too, and up, gate and down nearly."""
    return f"the scale of model.layers.{ending.rpartition('.')[0]}."


def _rows_scaled(ending: str, rows: int, factor: float) -> Any:
    def change(output: Any) -> Any:
        output = output.clone()
        output[..., :rows] *= factor
        return output

    return _output(ending, change)


def _input(ending: str, change: Callable[[Any], Any]) -> Any:
    def hooked(model: Any, name: str | None) -> None:
        module = _base(model, ending)
        if not getattr(module, "_planted", False):
            module._planted = True
            module.register_forward_pre_hook(lambda _module, inputs: (change(inputs[0]), *inputs[1:]))

    return _models(hooked)


def _exchanged_columns(states: Any) -> Any:
    return states[..., [1, 0, *range(2, states.shape[-1])]]


def _pairs_of(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A") and len(module.lora_A)}


def _lora(change: Callable[[dict[str, Any]], None], own: str | None = None) -> Any:
    """Change the pairs of the adapters, or of one of them."""

    def changed(model: Any, name: str | None) -> None:
        if name is not None and own in (None, name):
            with torch.no_grad():
                change(_pairs_of(model))

    return _models(changed)


def _of(pairs: Mapping[str, Any], ending: str, side: str = "lora_B") -> Any:
    module = next(module for name, module in pairs.items() if name.endswith(ending))
    return next(iter(getattr(module, side).values())).weight


def _cut_rank(pairs: Mapping[str, Any]) -> None:
    for name in pairs:
        _of(pairs, name)[:, 4:] = 0


def _fused_offset(pairs: Mapping[str, Any]) -> None:
    """The v slice of a fused qkv adapter is read where the k slice lies."""
    for side in ("lora_A", "lora_B"):
        _of(pairs, "1.self_attn.v_proj", side).copy_(_of(pairs, "1.self_attn.k_proj", side))


def _layers_exchanged(pairs: Mapping[str, Any]) -> None:
    for side in ("lora_A", "lora_B"):
        first, second = _of(pairs, "0.mlp.down_proj", side), _of(pairs, "1.mlp.down_proj", side)
        held = first.clone()
        first.copy_(second)
        second.copy_(held)


def _times(ending: str, factor: float) -> Callable[[Mapping[str, Any]], None]:
    return lambda pairs: _of(pairs, ending).mul_(factor) and None


def _transposed(pairs: Mapping[str, Any]) -> None:
    for side in ("lora_A", "lora_B"):
        weight = _of(pairs, "1.self_attn.o_proj", side)
        weight.copy_(weight.flip(0))


def _attention(**values: Any) -> Any:
    def changed(model: Any, _: str | None) -> None:
        for name, module in model.named_modules():
            if name.endswith("self_attn"):
                for key, value in values.items():
                    setattr(module, key, value(getattr(module, key)) if callable(value) else value)

    return _models(changed)


def _norms(change: Callable[[Any], None]) -> Any:
    def changed(model: Any, _: str | None) -> None:
        for name, module in model.named_modules():
            if name.endswith("norm") and not getattr(module, "_planted", False):
                module._planted = True
                change(module)

    return _models(changed)


def _gelu(model: Any, _: str | None) -> None:
    for name, module in model.named_modules():
        if name.endswith("mlp"):
            module.act_fn = torch.nn.GELU(approximate="tanh")


def _tied(model: Any, _: str | None) -> None:
    model.get_output_embeddings().weight = model.get_input_embeddings().weight


def _head_hook(change: Callable[[Any], Any]) -> Any:
    def changed(model: Any, _: str | None) -> None:
        head = model.get_output_embeddings()
        if not getattr(head, "_planted", False):
            head._planted = True
            head.register_forward_hook(lambda _module, _inputs, output: change(output))

    return _models(changed)


def _angles(change: Callable[[Any], Any]) -> Any:
    def changed(model: Any, _: str | None) -> None:
        rotary = _named(model, "rotary_emb")
        if not getattr(rotary, "_planted", False):
            rotary._planted = True
            rotary.inv_freq = change(rotary.inv_freq)

    return _models(changed)


def _blocks_of_sixteen(values: torch.Tensor) -> torch.Tensor:
    values[15::16] -= 0.1
    return values


def _stale_prefixes(inner: Any, ids: Any, names: Any) -> list[Any]:
    """A prefix cache that does not know adapters: what begins alike is answered as the first one was."""
    held = inner.__dict__.setdefault("_held", {})
    answers = []
    for each, name in zip(ids, names, strict=True):
        first = held.setdefault(tuple(each[:32]), name)
        answers += inner.prompt_logprobs([each], [first])
    return answers


def _in_order_of_length(inner: Any, ids: Any, names: Any) -> list[Any]:
    """Answers come back as they are done, the shortest first."""
    answers = inner.prompt_logprobs(ids, names)
    return [answers[row] for row in sorted(range(len(ids)), key=lambda row: len(ids[row]))]


def _chunks(inner: Any, ids: Any, names: Any) -> list[Any]:
    """What lies behind 64 tokens is computed without what lies before."""
    answers = inner.prompt_logprobs(ids, names)
    for row, each in enumerate(ids):
        if len(each) > 66:
            answers[row][64:] = inner.prompt_logprobs([each[64:]], [names[row]])[0]
    return answers


def _begin_added(inner: Any, ids: Any, names: Any) -> list[Any]:
    return [values[1:] for values in inner.prompt_logprobs([[1, *each] for each in ids], names)]


def _sorted_names(inner: Any, ids: Any, names: Any) -> list[Any]:
    """Adapters are numbered as they are asked for, and looked up as they were loaded."""
    order = {"cloq": "one", "one": "two", "two": "cloq", None: None}
    return inner.prompt_logprobs(ids, [order[name] for name in names])


def _last_adapter_for_base(inner: Any, ids: Any, names: Any) -> list[Any]:
    """In a batch with an adapter, requests of the base get the last one."""
    last = next((name for name in reversed(names) if name), None)
    return inner.prompt_logprobs(ids, [name or last for name in names])


def _only_first_tokens_adapted(inner: Any, ids: Any, names: Any) -> list[Any]:
    answers = inner.prompt_logprobs(ids, names)
    plain = inner.prompt_logprobs(ids, [None] * len(ids))
    return [torch.cat([values[:56], bare[56:]]) for values, bare in zip(answers, plain, strict=True)]


def _for(adapter: str | None, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    return _scoring(
        lambda inner, ids, names: [
            change(values.clone()) if name == adapter else values
            for values, name in zip(inner.prompt_logprobs(ids, names), names, strict=True)
        ]
    )


def _large_batches(inner: Any, ids: Any, names: Any) -> list[Any]:
    """Of more than four requests the last ones are computed with padding that is looked at."""
    answers = inner.prompt_logprobs(ids, names)
    return [values - 0.05 if row >= 4 else values for row, values in enumerate(answers)]


def _batches_of_three(inner: Any, ids: Any, names: Any) -> list[Any]:
    """The kernel for three requests at once is a little off."""
    answers = inner.prompt_logprobs(ids, names)
    return [values - 0.05 for values in answers] if len(ids) == 3 else answers


def _refuses_long(inner: Any, ids: Any, names: Any) -> list[Any]:
    from cloq_export.errors import EngineError

    if max(map(len, ids)) > 64:
        raise EngineError("the engine ran out of memory")
    return inner.prompt_logprobs(ids, names)


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
    return _writing(lambda inner, ids, names, new: _stepwise(inner, ids, names, new, choose))


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

    return _writing(write)


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


_DIFFERENCE, _LONGEST, _MIXED_SCORES = "logprob_difference_max", "longest_difference_max", "mixed_batch_difference_max"
_GAP, _MIXED_GAP, _LIVE, _SCALE = "decode_gap_max", "mixed_decode_gap_max", "live_modules", "scale_error_max"
SCORES = [
    Fault("logarithms of base two", _DIFFERENCE, serve=_each(lambda v: v / math.log(2))),
    Fault("a temperature of 0.99", _DIFFERENCE, serve=_each(lambda v: v * 0.99)),
    Fault("an offset of 0.02", _DIFFERENCE, serve=_each(lambda v: v - 0.02)),
    Fault("cut at -4", _DIFFERENCE, serve=_each(lambda v: v.clamp(min=-4))),
    Fault("rounded to one digit", _DIFFERENCE, serve=_each(lambda v: (v * 10).round() / 10)),
    Fault("every sixteenth token off", _DIFFERENCE, serve=_each(_blocks_of_sixteen)),
    Fault("infinite where improbable", _DIFFERENCE, serve=_each(lambda v: torch.where(v < -6, -math.inf, v))),
    Fault("in reverse order", _DIFFERENCE, serve=_each(lambda v: v.flip(0))),
    Fault("a begin token that the engine adds", _DIFFERENCE, serve=_scoring(_begin_added)),
    Fault("adapters numbered in another order", _DIFFERENCE, serve=_scoring(_sorted_names)),
    Fault("one adapter's scores are NaN", _DIFFERENCE, serve=_for("two", lambda v: v * math.nan)),
    Fault("one adapter's scores are off", _DIFFERENCE, serve=_for("two", lambda v: v - 0.03)),
    # Six windows make no large batch.
    Fault(
        "the last of large batches off",
        _DIFFERENCE,
        plant=lambda scene: {"windows": 12},
        serve=_scoring(_large_batches),
    ),
    Fault("batches of three off", _DIFFERENCE, serve=_scoring(_batches_of_three)),
    Fault("long texts in pieces that do not see each other", _LONGEST, serve=_scoring(_chunks)),
    Fault("adapters reach the first tokens alone", _LONGEST, serve=_scoring(_only_first_tokens_adapted)),
    Fault("long texts are refused", _LONGEST, serve=_scoring(_refuses_long)),
    Fault(
        "the base alone is off beyond 60 tokens",
        _LONGEST,
        serve=_for(None, lambda v: torch.cat([v[:60], v[60:] - 0.1])),
    ),
    Fault("a prefix cache that does not know adapters", _DIFFERENCE, serve=_scoring(_stale_prefixes)),
    Fault("answers as they are done", _MIXED_SCORES, serve=_scoring(_in_order_of_length)),
    Fault("the base gets the last adapter of its batch", _MIXED_SCORES, serve=_scoring(_last_adapter_for_base)),
]
MODELS = [
    *(
        Fault(f"1% of the scale of {ending}", _SCALE, _block(ending), misread=_scale_read(ending, 1.01))
        for ending in ("1.mlp.gate_proj", "0.self_attn.o_proj", "1.mlp.down_proj")
    ),
    # What scales q scales the scores as k does.
    *(
        Fault(f"1% less of the scale of {ending}", _SCALE, _block(ending), misread=_scale_read(ending, 0.99))
        for ending in ("1.self_attn.q_proj", "0.self_attn.k_proj")
    ),
    *(
        Fault(
            f"1% of the scale of {ending} in bfloat16",
            _SCALE,
            _block(ending),
            lambda scene: {"dtype": "bfloat16", "windows": 96, "adapters": ("cloq",)},
            misread=_scale_read(ending, factor),
        )
        for ending, factor in (
            *(("1.self_attn.q_proj", 1.01), ("1.self_attn.k_proj", 0.99), ("0.self_attn.k_proj", 1.01)),
            *(("0.self_attn.v_proj", 0.99), ("1.self_attn.o_proj", 1.01), ("1.mlp.gate_proj", 0.99)),
            *(("0.mlp.up_proj", 1.01), ("1.mlp.down_proj", 0.99)),
        )
    ),
    # The runtime computes a layer and its adapters by one kernel, so what a hook on the layer does hits the base alone.
    *(
        Fault(
            f"1% of the scale of {ending} without an adapter alone",
            _SCALE,
            _block(ending),
            lambda scene: {"windows": 24},
            serve=_output(ending, lambda output: output * 1.01),
        )
        for ending in ("1.mlp.gate_proj", "0.mlp.down_proj")
    ),
    Fault(
        "5% in eight rows of one module, in the base alone", _DIFFERENCE, serve=_rows_scaled("1.mlp.up_proj", 8, 1.05)
    ),
    Fault(
        "two input columns exchanged, in the base alone",
        _DIFFERENCE,
        serve=_input("0.mlp.down_proj", _exchanged_columns),
    ),
    Fault("one row of a module lost, in the base alone", _DIFFERENCE, serve=_rows_scaled("0.self_attn.o_proj", 1, 0.0)),
    Fault(
        "outputs of a module rolled by one, in the base alone",
        _DIFFERENCE,
        serve=_output("1.self_attn.k_proj", lambda o: o.roll(1, -1)),
    ),
    Fault(
        "outputs cut at 1, in the base alone", _DIFFERENCE, serve=_output("1.mlp.gate_proj", lambda o: o.clamp(-1, 1))
    ),
    Fault("attention 3% too sharp", _DIFFERENCE, serve=_attention(scaling=lambda value: value * 1.03)),
    Fault(
        "heads of keys assigned otherwise, in the base alone",
        _DIFFERENCE,
        serve=_output("0.self_attn.k_proj", lambda o: o.roll(32, -1)),
    ),
    Fault("another rotary base", _DIFFERENCE, serve=_angles(lambda f: f * 0.99)),
    Fault("rotary halves interleaved", _DIFFERENCE, serve=_angles(lambda f: f.flip(0))),
    Fault("another activation", _DIFFERENCE, serve=_models(_gelu)),
    Fault("the head is that of the embeddings", _DIFFERENCE, serve=_models(_tied)),
    Fault("a soft cap on the logits", _DIFFERENCE, serve=_head_hook(lambda o: 8 * torch.tanh(o / 8))),
    Fault("logits in eight bits", _DIFFERENCE, serve=_head_hook(lambda o: (o * 8).round() / 8)),
    Fault(
        "one is added to norms",
        _DIFFERENCE,
        serve=_norms(lambda norm: norm.register_forward_hook(lambda m, i, o: o * (1 + m.weight) / m.weight)),
    ),
    Fault(
        "norms without their weight",
        _DIFFERENCE,
        serve=_norms(lambda norm: norm.register_forward_hook(lambda m, i, o: o / m.weight)),
    ),
    Fault("the rank of adapters is cut", _DIFFERENCE, serve=_lora(_cut_rank)),
    Fault("a slice of a fused adapter at another offset", _LIVE, serve=_lora(_fused_offset)),
    Fault("pairs of two layers exchanged", _LIVE, serve=_lora(_layers_exchanged)),
    Fault("one pair applied twice", _LIVE, serve=_lora(_times("0.self_attn.o_proj", 2.0))),
    Fault("one pair with another sign in one adapter", _LIVE, serve=_lora(_times("1.mlp.up_proj", -1.0), "one")),
    Fault("one pair of one adapter ignored", _LIVE, serve=_lora(_times("1.self_attn.v_proj", 0.0), "two")),
    Fault("one pair a fifth too large", _DIFFERENCE, serve=_lora(_times("1.mlp.down_proj", 1.2), "one")),
    Fault("ranks in another order in A", _LIVE, serve=_lora(_transposed)),
]
TEXTS = [
    Fault("a repetition penalty", _GAP, serve=_stepping(_penalty)),
    Fault("every other token is the second best", _GAP, serve=_stepping(_second_of_two)),
    Fault("the adapter in the first token alone", _GAP, serve=_writing(_adapter_in_prefill_alone)),
    Fault("steps see eight tokens", _GAP, serve=_writing(_window_in_steps)),
    Fault("steps do not see the last token", _GAP, serve=_writing(_context_lost)),
    Fault("padding of shorter prompts is read", _GAP, serve=_writing(_padding_read)),
    Fault("all texts are the first prompt's", _GAP, serve=_writing(_only_first_prompt)),
    Fault(
        "a begin token before prompts",
        _GAP,
        serve=_writing(lambda e, ids, names, new: e.generate([[1, *each] for each in ids], names, new)),
    ),
    Fault(
        "prompts written backwards",
        _GAP,
        serve=_writing(lambda e, ids, names, new: e.generate([each[::-1] for each in ids], names, new)),
    ),
    Fault("one token too few", _GAP, serve=_each_text(lambda text: text[:-1])),
    Fault("the text begins with its second token", _GAP, serve=_each_text(lambda text: [*text[1:], text[0]])),
    Fault(
        "the prompt's last token comes again",
        _GAP,
        serve=_writing(
            lambda e, ids, names, new: [
                [p[-1], *t][:new] for p, t in zip(ids, e.generate(ids, names, new), strict=True)
            ]
        ),
    ),
    Fault(
        "one token in the middle is wrong",
        _GAP,
        serve=_each_text(lambda text: [*text[:3], (text[3] + 1) % 90, *text[4:]] if len(text) > 4 else [7] * 5),
    ),
    Fault("negative tokens", _GAP, serve=_each_text(lambda text: [-1, *text[1:]])),
    Fault(
        "base requests of mixed batches are dropped to an adapter",
        _MIXED_GAP,
        serve=_mixed(lambda names: [name or "two" for name in names]),
    ),
    Fault("adapters of mixed batches lost", _MIXED_GAP, serve=_mixed(lambda names: [None for _ in names])),
    Fault(
        "adapters of mixed batches shifted by one request",
        _MIXED_GAP,
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
                    _DIFFERENCE,
                    _LONGEST,
                    _SCALE,
                    "perplexity_over_recorded",
                    "greedy_flips",
                    _GAP,
                    _LIVE,
                    _MIXED_SCORES,
                    _MIXED_GAP,
                )
            )
        ),
    ),
    Fault("no prompts", "judged", "--prompts 0", lambda scene: {"prompts": 0}),
    Fault("a text shorter than a window", "judged", "nothing was judged", _short_text),
    Fault("a longest text beyond the model", "judged", str(CONTEXT), lambda scene: {"longest": 10 * CONTEXT}),
    Fault("texts of one token", "judged", "--new-tokens", lambda scene: {"new_tokens": 1}),
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
