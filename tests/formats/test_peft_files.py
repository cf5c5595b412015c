"""Adapters of others, and damaged ones: read as PEFT reads them, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft_adapters import FINGERPRINT, golden_pairs

from cloq_export.errors import FormatError
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.files.tensor_writer import write_safetensors
from cloq_export.formats.peft import read_adapter, write_adapter
from cloq_export.formats.peft.config import refuse_unlisted


def change_config(folder: Path, change: dict) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA' is read"),
        ({"bias": "all"}, "bias is 'all'; only plain LoRA matrices are read"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"use_dora": True}, "use_dora is True; only plain LoRA is read"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq', which changes the base weights; convert"),
        ({"init_lora_weights": []}, "init_lora_weights is"),
        ({"r": "2"}, "r is '2' and lora_alpha 2; expected numbers"),
        ({"lora_alpha": None}, "lora_alpha None; expected numbers"),
        ({"lora_alpha": float("nan")}, "expected numbers"),
        ({"rank_pattern": [1]}, "rank_pattern is a list; expected an object"),
        ({"rank_pattern": {"(a": 1}}, r"the pattern '.*\(a\)\$' is not read \(a group is not closed\)"),
        ({"alpha_pattern": {"q": "x"}}, "alpha_pattern maps 'q' to 'x'"),
        ({"rank_pattern": {"down_proj": 0}}, r"gives model\.layers\.0\.mlp\.down_proj rank 0; a rank is 1 or more"),
        ({"rank_pattern": {}}, "lora_A of model.layers.0.mlp.down_proj has shape .*, but .* gives rank 2"),
    ],
)
def test_hostile_config(tmp_path: Path, change: dict, message: str) -> None:
    write_adapter(tmp_path / "a", golden_pairs(), base_model="m", base_fingerprint=FINGERPRINT)
    change_config(tmp_path / "a", change)
    with pytest.raises(FormatError, match=message) as caught:
        read_adapter(tmp_path / "a")
    assert "\n" not in str(caught.value)


DOWN = "base_model.model.model.layers.0.mlp.down_proj.lora_"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(DOWN + "B.weight"), r"lacks lora_B of model\.layers\.0\.mlp\.down_proj"),
        (lambda t: t.update({DOWN + "magnitude_vector": torch.zeros(2)}), "which is no LoRA matrix of the form"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(2)}), "'lm_head.weight', which is no LoRA matrix"),
        (lambda t: t.update({DOWN + "A.weight": torch.zeros(1, 4).int()}), r"is torch\.int32; expected one of torch"),
        (
            lambda t: t.update({DOWN + "A.weight": torch.zeros(1, 4).to(torch.float8_e4m3fn)}),
            r"is torch\.float8_e4m3fn; expected one of torch.float32, .* Save the adapter again in one of them",
        ),
        (lambda t: t.update({DOWN + "A.weight": torch.zeros(4)}), r"has shape \(4,\), but .* gives rank 1"),
        (lambda t: t.update({DOWN + "B.weight": torch.zeros(8, 2).half()}), "a LoRA pair is A"),
        (lambda t: t.update({DOWN + "B.weight": torch.zeros(8, 1)}), r"A is torch\.float16 and B is torch\.float32"),
        (lambda t: t.update({DOWN + "A.weight": torch.full((1, 4), float("nan")).half()}), "holds NaN or Inf"),
        (lambda t: t.clear(), "holds no tensor; the adapter is empty"),
    ],
)
def test_hostile_weights(tmp_path: Path, change, message: str) -> None:
    folder = tmp_path / "a"
    write_adapter(folder, golden_pairs(), base_model="m", base_fingerprint=FINGERPRINT)
    tensors, metadata = read_safetensors(folder / "adapter_model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    write_safetensors(folder / "adapter_model.safetensors", tensors, metadata)
    with pytest.raises(FormatError, match=message) as caught:
        read_adapter(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["experts.gate_up_proj"], "target_parameters names experts.gate_up_proj, a tensor of which nothing says how"),
        ("all", "target_parameters is 'all'; expected a list of names"),
    ],
)
def test_parameters_of_which_nothing_is_known_are_refused(tmp_path: Path, value: object, message: str) -> None:
    write_adapter(tmp_path / "a", golden_pairs(), base_model="m", base_fingerprint=FINGERPRINT)
    change_config(tmp_path / "a", {"target_parameters": value})
    with pytest.raises(FormatError, match=message) as caught:
        read_adapter(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_missing_and_truncated_files(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with pytest.raises(FormatError, match=r"a is not a folder; give the folder that holds adapter_config\.json"):
        read_adapter(folder)
    write_adapter(folder, golden_pairs(), base_model="m", base_fingerprint=FINGERPRINT)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"adapter_model\.safetensors is truncated or not a safetensors file"):
        read_adapter(folder)
    weights.unlink()
    with pytest.raises(FormatError, match=r"adapter_model\.safetensors does not exist"):
        read_adapter(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match=r"adapter_config\.json does not exist"):
        read_adapter(folder)


def rewrite(folder: Path, change) -> None:
    tensors, metadata = read_safetensors(folder / "adapter_model.safetensors")
    write_safetensors(
        folder / "adapter_model.safetensors", change({n: t.clone() for n, t in tensors.items()}), metadata
    )


def test_patterns_are_read_by_the_rule_of_peft(tiny_llama, tmp_path: Path) -> None:
    import copy

    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        rank_pattern={
            r".*\.0\.self_attn\.(q|v)_proj": 8,
            "v_proj": 2,
            r"^model\.layers\.0\.mlp\.up_proj$": 3,
            "mlp.d.wn_proj": 6,
        },
        alpha_pattern={r"layers\.[1-9]\..*": 3, "down_proj": 5},
        use_rslora=True,
        init_lora_weights=False,
    )
    get_peft_model(copy.deepcopy(tiny_llama), config).save_pretrained(tmp_path / "a")
    # PEFT sorts the keys when it saves, so where several match, the file and not the config above tells which is first.
    wrapped = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), tmp_path / "a")
    read = read_adapter(tmp_path / "a").pairs
    assert len({pair.rank for pair in read.values()}) >= 4
    for name, pair in read.items():
        delta = wrapped.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        torch.testing.assert_close(delta, pair.product(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.removeprefix("base_model.model.").replace(".weight", ".mine.weight"),
    ],
)
def test_keys_as_other_savers_leave_them(tmp_path: Path, rename) -> None:
    pairs = golden_pairs()
    write_adapter(tmp_path / "a", pairs, base_model="m", base_fingerprint=FINGERPRINT)
    rewrite(tmp_path / "a", lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    read = read_adapter(tmp_path / "a").pairs
    assert set(read) == set(pairs)
    assert all(torch.equal(read[name].lora_B, pair.lora_B) for name, pair in pairs.items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (DOWN + "A.other.weight", "matrices of several adapters; save each in a folder of its own"),
        (DOWN.removeprefix("base_model.model.") + "A.weight", "holds lora_A of .* twice, with and without"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", r"\(it adapts embeddings\)"),
        ("base_model.model.lm_head.weight", r"\(a whole weight: modules_to_save, or embeddings saved beside\)"),
        ("base_model.model.lm_head.modules_to_save.default.weight", r"\(a whole trained weight\)"),
        (DOWN + "magnitude_vector.default.weight", r"\(the magnitude of DoRA\)"),
    ],
)
def test_tensors_that_are_no_pair_are_named(tmp_path: Path, name: str, message: str) -> None:
    write_adapter(tmp_path / "a", golden_pairs(), base_model="m", base_fingerprint=FINGERPRINT)
    rewrite(tmp_path / "a", lambda tensors: {**tensors, name: torch.zeros(1, 4, dtype=torch.float16)})
    with pytest.raises(FormatError, match=message):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_is_named_with_the_remedy(tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path / "a", golden_pairs(), base_model="m", base_fingerprint=FINGERPRINT)
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / name)
    with pytest.raises(FormatError, match=rf"holds {name} but no adapter_model.safetensors; .* save_pretrained writes"):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("layer_replication", [[0, 2]]),
        ("kasa_config", {"beta": 1e-4}),
        ("velora_config", {}),
        ("arrow_config", {"top_k": 1}),
        ("megatron_config", {}),
        ("trainable_token_indices", [1]),
        ("alora_invocation_tokens", [1]),
        ("lora_bias", True),
        ("an_option_of_tomorrow", 0.5),
    ],
)
def test_options_that_change_what_a_pair_means_are_refused(tmp_path: Path, option: str, value) -> None:
    write_adapter(tmp_path / "a", golden_pairs(), base_model="m", base_fingerprint=FINGERPRINT)
    change_config(tmp_path / "a", {option: value})
    with pytest.raises(FormatError, match=f"{option} is .*; only plain LoRA is read"):
        read_adapter(tmp_path / "a")


def test_every_option_that_peft_writes_unset_is_read(tmp_path: Path) -> None:
    from peft import LoraConfig

    write_adapter(tmp_path / "a", golden_pairs(), base_model="m", base_fingerprint=FINGERPRINT)
    unset = {key: value for key, value in LoraConfig().to_dict().items() if key not in ("r", "lora_alpha", "peft_type")}
    kept = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**unset, "tomorrow": {}, **kept}))
    assert set(read_adapter(tmp_path / "a").pairs) == set(golden_pairs())


@pytest.mark.parametrize("name", ["new_embeddings.safetensors", "non_lora_trainables.bin"])
def test_trained_weights_beside_the_pairs_are_named(tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path / "a", golden_pairs(), base_model="m", base_fingerprint=FINGERPRINT)
    (tmp_path / "a" / name).write_bytes(b"")
    with pytest.raises(FormatError, match=f"holds {name}, trained weights besides its pairs, which are not read"):
        read_adapter(tmp_path / "a")


MODULES = [
    f"model.layers.{layer}.{name}" for layer in (0, 1, 11) for name in ("self_attn.q_proj", "mlp.experts.3.up_proj")
] + ["lm_head", "model.norm_proj"]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": ["proj"]},
        {"target_modules": ["lm_head", "self_attn.q_proj"]},
        {"target_modules": r".*layers\.(0|1)\..*_proj"},
        {"target_modules": r"layers\.0\..*_proj"},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*experts.*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 11]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 3},
        {"target_modules": ["q_proj", "model.layers.0.self_attn.q_proj"], "layers_to_transform": [1]},
    ],
)
def test_modules_that_the_config_leaves_out_are_those_of_peft(options: dict[str, Any]) -> None:
    config = LoraConfig(**options)
    content = {**options, "peft_type": "LORA"}
    for module in MODULES:
        if check_target_module_exists(config, module):
            refuse_unlisted(content, [module], "adapter_config.json")
            continue
        with pytest.raises(
            FormatError, match=rf"adapter_config.json: \w+ leaves out {module}, .* PEFT would pass over"
        ):
            refuse_unlisted(content, [module], "adapter_config.json")


def test_an_adapter_whose_config_leaves_a_pair_out_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", golden_pairs(), base_model="m", base_fingerprint=FINGERPRINT)
    change_config(tmp_path / "a", {"exclude_modules": ["down_proj"]})
    with pytest.raises(FormatError, match=r"exclude_modules leaves out model\.layers\.0\.mlp\.down_proj"):
        read_adapter(tmp_path / "a")
