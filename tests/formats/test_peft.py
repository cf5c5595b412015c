"""The PEFT layout: golden bytes, upstream PEFT loads what we write, hostile adapters are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft_adapters import (
    FINGERPRINT,
    GOLDEN,
    assert_same_pairs,
    golden,
    golden_pairs,
    llama_pairs,
    make_pair,
)

from cloq_export.errors import FormatError, RunDirectoryError
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.formats.peft import is_adapter, read_adapter, write_adapter
from cloq_export.types import LoraPair


def test_golden_bytes(tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in (GOLDEN / "adapter").iterdir()}
    assert files == golden.golden_files(), "the golden files are not what their script makes"
    write_adapter(
        tmp_path / "a", golden_pairs(), base_model=golden.BASE_MODEL, base_fingerprint=golden.BASE_FINGERPRINT
    )
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == files
    adapter = read_adapter(GOLDEN / "adapter")
    assert_same_pairs(adapter.pairs, golden_pairs())
    assert adapter.base_fingerprint == golden.BASE_FINGERPRINT
    assert adapter.config["base_model_name_or_path"] == golden.BASE_MODEL


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    pairs = {f"model.layers.{i}.q": make_pair(8, 16, 2 + i % 3, 3.5 * (i + 1), i, dtype) for i in range(12)}
    write_adapter(tmp_path / "a", pairs, base_model="m", base_fingerprint=FINGERPRINT)
    adapter = read_adapter(tmp_path / "a")
    assert_same_pairs(adapter.pairs, dict(sorted(pairs.items())))
    assert adapter.pairs["model.layers.1.q"].lora_A.dtype == dtype
    assert is_adapter(tmp_path / "a")
    assert not is_adapter(tmp_path)


def test_a_name_that_ends_with_another_keeps_its_own_rank(tmp_path: Path) -> None:
    pairs = {
        "layers.0.q": make_pair(4, 8, 3, 3.0, 0),
        "encoder.layers.0.q": make_pair(4, 8, 2, 2.0, 1),
        "decoder.layers.0.q": make_pair(4, 8, 2, 5.0, 2),
        "layers.1.q": make_pair(4, 8, 2, 2.0, 3),
    }
    write_adapter(tmp_path / "a", pairs, base_model="m", base_fingerprint=FINGERPRINT)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert list(config["rank_pattern"].items()) == [
        ("decoder.layers.0.q", 2),
        ("encoder.layers.0.q", 2),
        ("layers.0.q", 3),
    ]
    assert_same_pairs(read_adapter(tmp_path / "a").pairs, dict(sorted(pairs.items())))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_upstream_peft_loads_it(tiny_llama, tmp_path: Path, dtype: torch.dtype) -> None:
    import copy

    from peft import PeftModel

    pairs = {
        name: LoraPair(pair.lora_A.to(dtype), pair.lora_B.to(dtype), pair.alpha)
        for name, pair in llama_pairs(tiny_llama).items()
    }
    assert len(pairs) == 8
    write_adapter(tmp_path / "a", pairs, base_model="tiny", base_fingerprint=FINGERPRINT)

    model = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), tmp_path / "a")  # any warning fails the test
    adapted = {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(pairs)
    for name, pair in pairs.items():
        delta = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        torch.testing.assert_close(delta, pair.product(), rtol=1e-5, atol=1e-5)

    # Alpha and ranks taken together: the logits of a model whose weights were changed by hand.
    changed = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        for name, pair in pairs.items():
            changed.get_submodule(name).weight += pair.product()
        tokens = torch.arange(12).view(2, 6)
        torch.testing.assert_close(model(tokens).logits, changed(tokens).logits, rtol=1e-4, atol=1e-4)


def test_what_peft_saves_is_read(tiny_llama, tmp_path: Path) -> None:
    import copy

    from peft import LoraConfig, PeftModel, get_peft_model

    pairs = llama_pairs(tiny_llama)
    write_adapter(tmp_path / "a", pairs, base_model="tiny", base_fingerprint=FINGERPRINT)
    model = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    assert_same_pairs(read_adapter(tmp_path / "b").pairs, dict(sorted(pairs.items())))
    assert read_adapter(tmp_path / "b").base_fingerprint is None  # PEFT drops what it does not know

    torch.manual_seed(0)
    config = LoraConfig(r=9, lora_alpha=6, use_rslora=True, target_modules=["q_proj"], init_lora_weights=False)
    other = get_peft_model(copy.deepcopy(tiny_llama), config)
    other.save_pretrained(tmp_path / "c")
    pair = read_adapter(tmp_path / "c").pairs["model.layers.0.self_attn.q_proj"]
    assert math.isclose(pair.alpha, 18.0)
    delta = other.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").get_delta_weight("default")
    torch.testing.assert_close(pair.product(), delta, rtol=1e-5, atol=1e-6)


def test_binding(tmp_path: Path) -> None:
    pairs = golden_pairs()
    folder = tmp_path / "a"
    write_adapter(folder, pairs, base_model="m", base_fingerprint=FINGERPRINT)
    binding = json.loads((folder / "cloq_adapter.json").read_text())
    assert read_safetensors(folder / "adapter_model.safetensors")[1]["cloq_base_fingerprint"] == FINGERPRINT
    (folder / "cloq_adapter.json").unlink()
    assert read_adapter(folder).base_fingerprint == FINGERPRINT
    (folder / "cloq_adapter.json").write_text(json.dumps(binding | {"base_fingerprint": "sha256:" + "6" * 64}))
    with pytest.raises(FormatError, match=r"names the base sha256:666666666666… but .* names sha256:555555555555…; "):
        read_adapter(folder)
    (folder / "cloq_adapter.json").write_text(json.dumps(binding | {"format_version": 2}))
    with pytest.raises(FormatError, match=r"version 2; this program reads 'cloq-adapter', version 1"):
        read_adapter(folder)
    (folder / "cloq_adapter.json").write_text(json.dumps(binding | {"base_fingerprint": 3}))
    with pytest.raises(FormatError, match="base_fingerprint is 3; the file is damaged"):
        read_adapter(folder)


def test_how_an_adapter_was_made_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    extra = {"split": "balanced", "padded_from": 60, "forced": True}
    write_adapter(folder, golden_pairs(), base_model="m", base_fingerprint=FINGERPRINT, extra=extra)
    assert read_adapter(folder).extra == extra
    binding = json.loads((folder / "cloq_adapter.json").read_text())
    assert binding["extra"] == extra
    (folder / "cloq_adapter.json").write_text(json.dumps(binding | {"extra": [1]}))
    with pytest.raises(FormatError, match="extra is a list; expected an object"):
        read_adapter(folder)
    write_adapter(folder, golden_pairs(), base_model="m", base_fingerprint=FINGERPRINT)
    assert read_adapter(folder).extra == {}


@pytest.mark.parametrize("extra", [None, {"forced": True, "history": ["cloq", {"split": "balanced"}]}])
def test_what_is_written_fits_the_schema(tmp_path: Path, extra) -> None:
    import jsonschema

    schema = json.loads((GOLDEN.parent / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    pairs = golden_pairs() | {"model.layers.1.mlp.down_proj": make_pair(8, 4, 3, 4.5, 0, torch.float16)}
    write_adapter(tmp_path / "a", pairs, base_model="m", base_fingerprint=FINGERPRINT, extra=extra)
    for name in ("adapter_config", "cloq_adapter"):
        part = jsonschema.Draft202012Validator({**schema, "oneOf": [{"$ref": f"#/$defs/{name}"}]})
        content = json.loads((tmp_path / "a" / f"{name}.json").read_text())
        jsonschema.Draft202012Validator(schema).validate(content)
        part.validate(content)
        part.validate(json.loads((GOLDEN / "adapter" / f"{name}.json").read_text()))
        only_stacked = {"target_parameters", "stacked_experts"}
        assert set(content) | {"extra"} | only_stacked >= set(schema["$defs"][name]["properties"])
        for key in schema["$defs"][name]["required"]:
            assert not part.is_valid({other: value for other, value in content.items() if other != key}), key
        assert not part.is_valid(content | {"unknown": 1})


def test_peft_knows_every_key_of_the_config(tmp_path: Path) -> None:
    import dataclasses

    from peft import LoraConfig

    write_adapter(tmp_path / "a", golden_pairs(), base_model="m", base_fingerprint=FINGERPRINT)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert set(config) <= {field.name for field in dataclasses.fields(LoraConfig)}


def test_writing_again_and_over_other_files(tmp_path: Path) -> None:
    pairs = golden_pairs()
    write_adapter(tmp_path / "a", pairs, base_model="m", base_fingerprint=FINGERPRINT)
    first = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    write_adapter(tmp_path / "a", dict(reversed(pairs.items())), base_model="m", base_fingerprint=FINGERPRINT)
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == first
    (tmp_path / "a" / "training_state.bin").write_text("mine")
    with pytest.raises(RunDirectoryError, match="holds files that were not written by this command"):
        write_adapter(tmp_path / "a", pairs, base_model="m", base_fingerprint=FINGERPRINT)
    with pytest.raises(FormatError, match="an adapter needs at least one LoRA pair; rank 0 makes none"):
        write_adapter(tmp_path / "b", {}, base_model="m", base_fingerprint=FINGERPRINT)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
