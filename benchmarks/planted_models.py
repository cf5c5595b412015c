"""Faults of engines inside of the models that they load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from faulty_engine import DIFFERENCE, LIVE, SCALE, changed_models, named_module
from planted_scene import Fault, edit_tensors


def _base(model: Any, ending: str) -> Any:
    """Return a packed linear, whether an adapter wraps it or not."""
    module = named_module(model, ending)
    return getattr(module, "base_layer", module)


def _output(ending: str, change: Callable[[Any], Any], only: Callable[[str | None], bool] = lambda name: True) -> Any:
    """Change what a quantized module puts out, the adapter beside it left alone."""

    def hooked(model: Any, name: str | None) -> None:
        module = _base(model, ending)
        # A base that several models share is hooked once.
        if only(name) and not getattr(module, "_planted", False):
            module._planted = True
            module.register_forward_hook(lambda _module, _inputs, output: change(output))

    return changed_models(hooked)


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

    return changed_models(hooked)


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

    return changed_models(changed)


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

    return changed_models(changed)


def _norms(change: Callable[[Any], None]) -> Any:
    def changed(model: Any, _: str | None) -> None:
        for name, module in model.named_modules():
            if name.endswith("norm") and not getattr(module, "_planted", False):
                module._planted = True
                change(module)

    return changed_models(changed)


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

    return changed_models(changed)


def _angles(change: Callable[[Any], Any]) -> Any:
    def changed(model: Any, _: str | None) -> None:
        rotary = named_module(model, "rotary_emb")
        if not getattr(rotary, "_planted", False):
            rotary._planted = True
            rotary.inv_freq = change(rotary.inv_freq)

    return changed_models(changed)


MODELS = [
    *(
        Fault(f"1% of the scale of {ending}", SCALE, _block(ending), misread=_scale_read(ending, 1.01))
        for ending in ("1.mlp.gate_proj", "0.self_attn.o_proj", "1.mlp.down_proj")
    ),
    # What scales q scales the scores as k does.
    *(
        Fault(f"1% less of the scale of {ending}", SCALE, _block(ending), misread=_scale_read(ending, 0.99))
        for ending in ("1.self_attn.q_proj", "0.self_attn.k_proj")
    ),
    *(
        Fault(
            f"1% of the scale of {ending} in bfloat16",
            SCALE,
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
            SCALE,
            _block(ending),
            lambda scene: {"windows": 24},
            serve=_output(ending, lambda output: output * 1.01),
        )
        for ending in ("1.mlp.gate_proj", "0.mlp.down_proj")
    ),
    Fault(
        "5% in eight rows of one module, in the base alone", DIFFERENCE, serve=_rows_scaled("1.mlp.up_proj", 8, 1.05)
    ),
    Fault(
        "two input columns exchanged, in the base alone",
        DIFFERENCE,
        serve=_input("0.mlp.down_proj", _exchanged_columns),
    ),
    Fault("one row of a module lost, in the base alone", DIFFERENCE, serve=_rows_scaled("0.self_attn.o_proj", 1, 0.0)),
    Fault(
        "outputs of a module rolled by one, in the base alone",
        DIFFERENCE,
        serve=_output("1.self_attn.k_proj", lambda o: o.roll(1, -1)),
    ),
    Fault(
        "outputs cut at 1, in the base alone", DIFFERENCE, serve=_output("1.mlp.gate_proj", lambda o: o.clamp(-1, 1))
    ),
    Fault("attention 3% too sharp", DIFFERENCE, serve=_attention(scaling=lambda value: value * 1.03)),
    Fault(
        "heads of keys assigned otherwise, in the base alone",
        DIFFERENCE,
        serve=_output("0.self_attn.k_proj", lambda o: o.roll(32, -1)),
    ),
    Fault("another rotary base", DIFFERENCE, serve=_angles(lambda f: f * 0.99)),
    Fault("rotary halves interleaved", DIFFERENCE, serve=_angles(lambda f: f.flip(0))),
    Fault("another activation", DIFFERENCE, serve=changed_models(_gelu)),
    Fault("the head is that of the embeddings", DIFFERENCE, serve=changed_models(_tied)),
    Fault("a soft cap on the logits", DIFFERENCE, serve=_head_hook(lambda o: 8 * torch.tanh(o / 8))),
    Fault("logits in eight bits", DIFFERENCE, serve=_head_hook(lambda o: (o * 8).round() / 8)),
    Fault(
        "one is added to norms",
        DIFFERENCE,
        serve=_norms(lambda norm: norm.register_forward_hook(lambda m, i, o: o * (1 + m.weight) / m.weight)),
    ),
    Fault(
        "norms without their weight",
        DIFFERENCE,
        serve=_norms(lambda norm: norm.register_forward_hook(lambda m, i, o: o / m.weight)),
    ),
    Fault("the rank of adapters is cut", DIFFERENCE, serve=_lora(_cut_rank)),
    Fault("a slice of a fused adapter at another offset", LIVE, serve=_lora(_fused_offset)),
    Fault("pairs of two layers exchanged", LIVE, serve=_lora(_layers_exchanged)),
    Fault("one pair applied twice", LIVE, serve=_lora(_times("0.self_attn.o_proj", 2.0))),
    Fault("one pair with another sign in one adapter", LIVE, serve=_lora(_times("1.mlp.up_proj", -1.0), "one")),
    Fault("one pair of one adapter ignored", LIVE, serve=_lora(_times("1.self_attn.v_proj", 0.0), "two")),
    Fault("one pair a fifth too large", DIFFERENCE, serve=_lora(_times("1.mlp.down_proj", 1.2), "one")),
    Fault("ranks in another order in A", LIVE, serve=_lora(_transposed)),
]
