"""The PEFT layout: golden bytes, upstream PEFT loads what we write, hostile adapters are refused."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

import cloq_export.formats.peft as peft_layout
from cloq_export.errors import FormatError, NonFiniteError, RunDirectoryError, ShapeError
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.files.tensor_writer import write_safetensors
from cloq_export.formats.peft import (
    VLLM_MAX_LORA_RANKS,
    allowed_rank,
    balanced,
    is_adapter,
    padded,
    product_difference,
    read_adapter,
    uniform,
    write_adapter,
)
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
        assert set(content) | {"extra"} >= set(schema["$defs"][name]["properties"])
        for key in schema["$defs"][name]["required"]:
            assert not part.is_valid({other: value for other, value in content.items() if other != key}), key
        assert not part.is_valid(content | {"unknown": 1})


def test_peft_knows_every_key_of_the_config(tmp_path: Path) -> None:
    import dataclasses

    from peft import LoraConfig

    write_adapter(tmp_path / "a", golden_pairs(), base_model="m", base_fingerprint=FINGERPRINT)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert set(config) <= {field.name for field in dataclasses.fields(LoraConfig)}


def exact_product(pair: LoraPair) -> torch.Tensor:
    return (pair.lora_B.to(torch.float64) @ pair.lora_A.to(torch.float64)) * pair.scaling


def exact_difference(pair: LoraPair, reference: LoraPair) -> float:
    wanted = exact_product(reference)
    return float(torch.linalg.norm(exact_product(pair) - wanted) / torch.linalg.norm(wanted))


def conditioned_pair(
    out: int, columns: int, values: torch.Tensor, share: float, seed: int, dtype=torch.float32
) -> LoraPair:
    """A pair with the given singular values, the power `share` of them in B and the rest in A."""
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(out, len(values), generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64))
    lora_b, lora_a = u * values**share, (v * values ** (1 - share)).T
    return LoraPair(lora_a.to(dtype).contiguous(), lora_b.to(dtype).contiguous(), float(len(values)))


def spread(condition: float, rank: int) -> torch.Tensor:
    return torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64)


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, 2.0])
def test_balanced_split_is_the_svd_split(condition: float, share: float) -> None:
    values = spread(condition, 12)
    pair = conditioned_pair(40, 56, values, share, 3)
    split = balanced(pair)
    product = exact_product(pair)
    singular = torch.linalg.svdvals(product)[:12]
    # The oracle forms the product, whose own rounding hides singular values below 1e-16 of the largest.
    for factor in (split.lora_A @ split.lora_A.T, split.lora_B.T @ split.lora_B):
        torch.testing.assert_close(factor.to(torch.float64), torch.diag(singular), rtol=1e-5, atol=1e-6)
    assert split.alpha == split.rank == 12
    assert split.lora_A.dtype == torch.float32
    assert exact_difference(split, pair) < 2 * 2**-24 * 1.01
    largest = max(float(split.lora_A.abs().max()), float(split.lora_B.abs().max()))
    assert largest <= math.sqrt(float(singular[0])) * (1 + 1e-6)


@pytest.mark.parametrize(("dtype", "roundoff"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e4])
def test_balanced_split_loses_two_roundings_at_most(dtype: torch.dtype, roundoff: float, scale: float) -> None:
    # Magnitudes that float16 cannot hold: A reaches 1e9 while B falls to 1e-8, and the other way round.
    for share, seed in ((-1.0, 0), (0.0, 1), (1.0, 2), (2.0, 3)):
        pair = conditioned_pair(48, 64, scale * spread(1e6, 16), share, seed)
        split = balanced(pair, dtype)
        assert split.lora_A.dtype == split.lora_B.dtype == dtype
        assert max(float(split.lora_A.abs().max()), float(split.lora_B.abs().max())) < 1000
        error = product_difference(split, pair)
        assert error == pytest.approx(exact_difference(split, pair), rel=1e-6)
        assert error < 2 * roundoff + roundoff**2


def test_balanced_split_takes_the_scaling_in() -> None:
    pair = make_pair(24, 16, 4, 1.0, 0)
    split = balanced(pair)
    assert (pair.scaling, split.scaling) == (0.25, 1.0)
    assert product_difference(split, pair) < 1e-6
    zero = LoraPair(torch.zeros(2, 8), torch.zeros(4, 2), 2.0)
    assert not balanced(zero).lora_A.any()
    assert product_difference(balanced(zero), zero) == 0.0


def test_balanced_split_of_a_rank_above_the_layer() -> None:
    pair = make_pair(4, 16, 6, 6.0, 0)
    split = balanced(pair)
    assert split.rank == 6
    assert not split.lora_B[:, 4:].any()
    assert product_difference(split, pair) < 1e-6


def test_a_product_beyond_half_precision_is_refused() -> None:
    huge = LoraPair(torch.full((1, 4), 1e8), torch.full((4, 1), 1e8), 1.0)
    with pytest.raises(NonFiniteError, match=r"holds NaN or Inf in torch\.float16; store the adapter in float32"):
        balanced(huge, torch.float16)
    assert product_difference(balanced(huge), huge) < 1e-6


def test_product_difference_of_products_that_nearly_agree() -> None:
    pair = conditioned_pair(48, 64, spread(1e6, 16), 2.0, 0, torch.float64)
    near = LoraPair(pair.lora_A * (1 + 1e-9), pair.lora_B, pair.alpha)
    assert product_difference(near, pair) == pytest.approx(1e-9, rel=1e-5)
    assert product_difference(pair, pair) < 1e-15
    other = conditioned_pair(48, 64, spread(1e6, 10), 0.0, 1, torch.float64)
    assert product_difference(other, pair) == pytest.approx(exact_difference(other, pair), rel=1e-9)
    zero = LoraPair(torch.zeros(2, 64), torch.zeros(48, 2), 2.0)
    assert product_difference(zero, pair) == pytest.approx(1.0)
    assert product_difference(pair, zero) == math.inf
    with pytest.raises(ShapeError, match=r"the products are \(4, 8\) and \(48, 64\); only pairs of one layer"):
        product_difference(make_pair(4, 8, 2, 2.0, 0), pair)


@pytest.mark.parametrize(("rank", "alpha", "target"), [(60, 60.0, 64), (3, 1.0, 8), (5, 10.0, 320), (8, 4.5, 8)])
def test_padding_changes_no_digit_of_the_product(rank: int, alpha: float, target: int) -> None:
    pair = make_pair(12, 20, rank, alpha, 0, torch.float16)
    wide = padded(pair, target)
    assert wide.rank == target
    assert wide.scaling == pair.scaling
    assert torch.equal(wide.lora_A[:rank], pair.lora_A)
    assert torch.equal(wide.lora_B[:, :rank], pair.lora_B)
    assert not wide.lora_A[rank:].any()
    assert not wide.lora_B[:, rank:].any()
    assert wide.lora_A.dtype == torch.float16


def test_padding_that_cannot_be_exact_is_refused() -> None:
    with pytest.raises(ShapeError, match="a pair of rank 9 cannot be padded to rank 8; give 9 or more"):
        padded(make_pair(4, 8, 9, 9.0, 0), 8)
    with pytest.raises(ShapeError, match=r"no alpha gives exactly the scaling 0\.1111111111111111 at rank 10; split"):
        padded(make_pair(4, 8, 9, 1.0, 0), 10)


def test_allowed_rank() -> None:
    assert [allowed_rank(rank) for rank in (1, 2, 8, 60, 65, 257, 512)] == [1, 8, 8, 64, 128, 320, 512]
    assert allowed_rank(3, (16, 4)) == 4
    assert VLLM_MAX_LORA_RANKS == (1, 8, 16, 32, 64, 128, 256, 320, 512)
    with pytest.raises(ShapeError, match="rank 513 is above 512, the largest that is allowed; make the adapter with"):
        allowed_rank(513)


def test_uniform_pairs_need_no_patterns(tmp_path: Path) -> None:
    pairs = {
        "model.layers.0.q": make_pair(8, 16, 4, 4.0, 0, torch.float16),
        "model.layers.0.k": make_pair(8, 16, 6, 12.0, 1, torch.float16),
        "model.layers.0.v": make_pair(8, 16, 8, 2.0, 2, torch.float16),
    }
    same = uniform(pairs)
    assert (same.rank, same.alpha, same.inexact) == (8, 8.0, {})
    for module, pair in pairs.items():
        assert torch.equal(exact_product(same.pairs[module]), exact_product(pair))
    write_adapter(tmp_path / "a", same.pairs, base_model="m", base_fingerprint=FINGERPRINT)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert uniform(pairs, 64).rank == 64


def test_uniform_pairs_say_what_they_had_to_round() -> None:
    pairs = {
        "q": make_pair(8, 16, 4, 4.0, 0, torch.float16),
        "k": make_pair(8, 16, 4, 6.0, 1, torch.float16),
        "v": make_pair(8, 16, 4, 1.0, 2, torch.float16),
    }
    same = uniform(pairs)
    assert same.alpha == same.rank == 4
    assert set(same.inexact) == {"k"}
    assert same.inexact["k"] == pytest.approx(exact_difference(same.pairs["k"], pairs["k"]), rel=1e-6)
    assert 0 < same.inexact["k"] < 2**-11
    # A scaling that all share costs nothing, whatever it is.
    thirds = {name: make_pair(8, 16, 3, 1.0, seed) for seed, name in enumerate("qkv")}
    assert uniform(thirds).inexact == {}
    assert uniform(thirds).pairs["q"].scaling == 1 / 3
    # A power of two is not exact where it pushes entries among the subnormal numbers.
    tiny = {"q": pairs["q"], "k": LoraPair(torch.ones(1, 4).half(), torch.full((4, 1), 2**-14 * 1.001).half(), 2**-9)}
    assert set(uniform(tiny).inexact) == {"k"}
    off = {"q": pairs["q"], "k": LoraPair(torch.ones(1, 4), torch.ones(4, 1), 0.0)}
    assert uniform(off).inexact == {}
    assert not uniform(off).pairs["k"].lora_B.any()


def test_uniform_pairs_that_cannot_be() -> None:
    with pytest.raises(ShapeError, match="there is no LoRA pair to bring to one rank"):
        uniform({})
    with pytest.raises(ShapeError, match="the largest rank among the pairs is 6; rank 4 cannot hold it"):
        uniform({"q": make_pair(8, 16, 6, 6.0, 0)}, 4)
    loud = LoraPair(torch.ones(1, 4).half(), torch.full((4, 1), 6e4).half(), 2.0)
    with pytest.raises(NonFiniteError, match=r"k: B times 2 leaves the range of torch\.float16; store the adapter in"):
        uniform({"q": make_pair(4, 4, 1, 1.0, 0), "v": make_pair(4, 4, 1, 1.0, 1), "k": loud})


def test_what_uniform_and_balanced_write_is_served_by_peft(tiny_llama, tmp_path: Path) -> None:
    import copy

    from peft import PeftModel

    pairs = llama_pairs(tiny_llama)
    split = {name: balanced(pair) for name, pair in uniform(pairs, 8).pairs.items()}
    write_adapter(tmp_path / "a", split, base_model="tiny", base_fingerprint=FINGERPRINT, extra={"split": "balanced"})
    model = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), tmp_path / "a")
    for name, pair in pairs.items():
        delta = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        torch.testing.assert_close(delta, pair.product(), rtol=1e-5, atol=1e-5)


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
        ("target_parameters", ["experts.gate_up_proj"]),
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
