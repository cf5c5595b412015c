"""The PEFT layout: golden bytes, upstream PEFT loads what we write, hostile adapters are refused."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

import cloq_export.formats.peft as peft_layout
from cloq_export.errors import FormatError, RunDirectoryError
from cloq_export.formats.peft import is_adapter, read_adapter, write_adapter
from cloq_export.run.atomic import write_safetensors
from cloq_export.run.safe_tensors import read_safetensors
from cloq_export.types import LoraPair

GOLDEN = Path(peft_layout.__file__).parent / "golden"
FINGERPRINT = "sha256:" + "5" * 64


def load_generator():
    spec = importlib.util.spec_from_file_location("peft_golden_generate", GOLDEN / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


golden = load_generator()


def golden_pairs() -> dict[str, LoraPair]:
    return {
        module: LoraPair(
            torch.tensor(golden.matrix(rank, columns), dtype=torch.float16),
            torch.tensor(golden.matrix(rows, rank), dtype=torch.float16),
            alpha,
        )
        for module, (rank, alpha, columns, rows) in golden.MODULES.items()
    }


def make_pair(out: int, columns: int, rank: int, alpha: float, seed: int, dtype=torch.float32) -> LoraPair:
    generator = torch.Generator().manual_seed(seed)
    return LoraPair(
        torch.randn(rank, columns, generator=generator).to(dtype),
        torch.randn(out, rank, generator=generator).to(dtype),
        alpha,
    )


def assert_same_pairs(left, right) -> None:
    assert left.keys() == right.keys()
    for module in left:
        assert torch.equal(left[module].lora_A, right[module].lora_A)
        assert torch.equal(left[module].lora_B, right[module].lora_B)
        assert left[module].alpha == right[module].alpha


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


@pytest.fixture(scope="module")
def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def llama_pairs(model) -> dict[str, LoraPair]:
    """Pairs for all linears of the first block and for down_proj of the second, ranks and alphas mixed."""
    pairs = {}
    for index, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and (".layers.0." in name or name.endswith("1.mlp.down_proj")):
            rank = 6 if "mlp" in name else 4
            alpha = 2.0 * rank if "o_proj" in name else float(rank)
            pairs[name] = make_pair(module.out_features, module.in_features, rank, alpha, index)
    return pairs


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
        ({"rank_pattern": {"(a+)+$": 1}}, r"rank_pattern maps '\(a\+\)\+\$' to 1; only module names and numbers"),
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
        (lambda t: t.update({DOWN + "A.weight": torch.zeros(1, 4).int()}), r"is torch\.int32; expected a float dtype"),
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
