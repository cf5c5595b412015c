"""Cut the MLPs of a dense Llama model into experts: a real mixture of experts without a download.

`down(silu(gate(x)) * up(x))` is a sum over neurons, so an MLP of 1536 neurons is the sum of 8 MLPs of 192. As a Mixtral
with a router of zeros every token goes to all of them with weight 1/8, and `down_proj` times 8 makes it the same
function as the dense model. With `--chosen 4` a router that is fitted on a text takes the four experts that put out
most. That routes tokens as a sparse model does, but it is another function, and without training a far worse one.

    python benchmarks/sliced_experts.py smollm2-demo --out SLICED
    cloq run SLICED --out RUN --bits 3
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

# The router's softmax would weigh the chosen experts; scores this small leave the order and make the weights equal.
_SCORES = 1e-3
_RIDGE = 1e-3


def sliced(dense: Any, experts: int, chosen: int | None = None) -> Any:
    """Return the mixture of experts that computes what a dense Llama model computes; weights are copied.

    Args:
        dense: a LlamaForCausalLM.
        experts: how many; they have to divide the neurons of an MLP.
        chosen: experts of each token; None takes all. With fewer the router has to be fitted, see `fit_routers`.

    Returns:
        A MixtralForCausalLM in evaluation mode.
    """
    import transformers

    chosen = chosen or experts
    config = dense.config
    if config.model_type != "llama" or config.intermediate_size % experts:
        raise SystemExit(f"a Llama with MLPs of a multiple of {experts} neurons can be cut; this is {config}.")
    kept: tuple[str, ...] = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    kept += ("hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings")
    kept += ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
    mixture = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **{name: getattr(config, name) for name in kept},
            intermediate_size=config.intermediate_size // experts,
            num_local_experts=experts,
            num_experts_per_tok=chosen,
            sliding_window=None,
        )
    ).to(dense.dtype)
    state = dict(dense.state_dict())
    with torch.no_grad():
        for index, layer in enumerate(mixture.model.layers):
            gate, up, down = (
                state.pop(f"model.layers.{index}.mlp.{name}_proj.weight") for name in ("gate", "up", "down")
            )
            pairs = zip(gate.chunk(experts), up.chunk(experts), strict=True)
            layer.mlp.experts.gate_up_proj.copy_(torch.stack([torch.cat(pair) for pair in pairs]))
            layer.mlp.experts.down_proj.copy_(torch.stack(down.chunk(experts, dim=1)) * chosen)
            layer.mlp.gate.weight.zero_()
    missing, unexpected = mixture.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(".mlp." in name for name in missing)
    return mixture.eval()


@torch.no_grad()
def fit_routers(mixture: Any, dense: Any, windows: torch.Tensor) -> None:
    """Let each router choose the experts whose outputs are largest on a text: ridge regression on their norms.

    Args:
        mixture: from `sliced`.
        dense: the model that it was made from.
        windows: token ids, (samples, seqlen).
    """
    with _inputs_of_mlps(dense) as inputs:
        for ids in windows:
            dense(input_ids=ids[None])
    for layer, plain, states in zip(mixture.model.layers, dense.model.layers, inputs, strict=True):
        x = torch.cat(states).to(torch.float32)
        neurons = nn.functional.silu(plain.mlp.gate_proj(x)) * plain.mlp.up_proj(x)
        count = mixture.config.num_local_experts
        pieces = zip(neurons.chunk(count, dim=1), plain.mlp.down_proj.weight.chunk(count, dim=1), strict=True)
        norms = torch.stack([(of_expert @ down.T).norm(dim=1) for of_expert, down in pieces], 1)
        gram = x.T @ x
        gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
        scores = torch.linalg.solve(gram, x.T @ (norms - norms.mean(0)))
        layer.mlp.gate.weight.copy_(_SCORES * scores.T / scores.std())


@contextmanager
def _inputs_of_mlps(model: Any) -> Iterator[list[list[torch.Tensor]]]:
    inputs: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].flatten(0, -2)))
        for layer, kept in zip(model.model.layers, inputs, strict=True)
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def write_sliced(model: str, out: Path, experts: int, chosen: int | None, text: str) -> None:
    """Write the mixture of a dense model as a folder that `cloq run` takes."""
    from cloq_export.models.saving import save_source_files
    from cloq_export.models.source import open_model
    from cloq_export.texts.corpora import load_text, tokenize_text

    loaded = open_model(model)
    mixture = sliced(loaded.model, experts, chosen)
    if chosen not in (None, experts):
        ids = tokenize_text(loaded.tokenizer, load_text(text).text)
        fit_routers(mixture, loaded.model, ids[: 16 * 512].view(16, 512))
    save_source_files(loaded, out)
    mixture.save_pretrained(out)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a dense Llama model, as cloq run takes it")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--experts", type=int, default=8, help="experts of a block (8)")
    parser.add_argument("--chosen", type=int, help="experts of a token (all of them)")
    parser.add_argument("--text", default="embedded", help="what routers are fitted on, as --calibration")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    write_sliced(options.model, options.out, options.experts, options.chosen, options.text)


if __name__ == "__main__":
    main()
