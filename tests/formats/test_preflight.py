"""The preflight of an export, and how it is loaded: what an engine reads, and the reason why it does not."""

from __future__ import annotations

import pytest
from asked_targets import SHAPES, ask, make_specs

from cloq_export.errors import UsageError
from cloq_export.formats.targets.preflight import preflight
from cloq_export.formats.targets.snippets import load_snippets
from cloq_export.formats.targets.table import Exported, Target
from cloq_export.types import QuantSpec


@pytest.mark.parametrize(
    ("target", "grid", "options", "layout", "devices"),
    [
        ("vllm==0.32", {"bits": 4}, {}, "compressed_tensors", ("cpu", "cuda")),
        ("vllm==0.33", {"bits": 3}, {}, "compressed_tensors", ("cuda",)),
        ("vllm==0.32", {"bits": 4}, {"device": "cpu"}, "compressed_tensors", ("cpu",)),
        ("vllm==0.32", {"bits": 4, "symmetric": True}, {"layout": "gptq_v2"}, "gptq_v2", ("cpu", "cuda")),
        ("vllm==0.32", {"bits": 8, "symmetric": True}, {"layout": "gptq"}, "gptq", ("cuda",)),
        ("vllm==0.32", {"bits": 2}, {"layout": "merged"}, "merged", ("cpu", "cuda")),
        ("transformers", {"bits": 3}, {}, "compressed_tensors", ("cpu", "cuda")),
        ("transformers", {"bits": 3}, {"layout": "compressed_tensors_padded"}, "compressed_tensors_padded", None),
        ("transformers==5.23", {"bits": 4, "group_size": 16}, {"layout": "gptq_v2"}, "gptq_v2", None),
        ("gptqmodel", {"bits": 2}, {}, "gptq_v2", ("cpu", "cuda")),
        ("gptqmodel", {"bits": 3, "symmetric": True}, {"layout": "gptq"}, "gptq", ("cpu", "cuda")),
        ("sglang", {"bits": 4, "symmetric": True}, {}, "gptq", ("cpu", "cuda")),
        ("sglang", {"bits": 4, "symmetric": True}, {"device": "cuda"}, "compressed_tensors", ("cuda",)),
        ("sglang", {"bits": 4, "symmetric": True}, {"device": "cpu"}, "gptq", ("cpu",)),
        ("vllm", {"bits": 4, "symmetric": True}, {"layout": "auto_round_gptq"}, "auto_round_gptq", ("cpu", "cuda")),
        ("vllm", {"bits": 2, "symmetric": True}, {"layout": "auto_round_gptq"}, "auto_round_gptq", ("cuda",)),
        ("vllm", {"bits": 3}, {"layout": "auto_round", "plugin": True}, "auto_round", ("cpu", "cuda")),
        ("transformers", {"bits": 3}, {"layout": "auto_round"}, "auto_round", ("cpu", "cuda")),
        ("sglang", {"bits": 8, "symmetric": True}, {"layout": "auto_round_gptq"}, "auto_round_gptq", ("cuda",)),
    ],
)
def test_accepted(target, grid, options, layout, devices) -> None:
    decision = ask(target, make_specs(**grid), **options)
    assert decision.layout == layout
    assert devices is None or decision.devices == devices
    assert decision.rules


@pytest.mark.parametrize(
    ("target", "grid", "options", "message"),
    [
        ("vllm==0.32", {"bits": 4}, {"layout": "auto_round"}, r"vllm==0\.32 does not read auto_round on CPU or CUDA; "),
        (
            "sglang",
            {"bits": 4},
            {"layout": "auto_round_gptq", "device": "cuda"},
            r"reads 4 bits in auto_round_gptq on CUDA only symmetric \(zeros less one of asymmetric layers are refused",
        ),
        (
            "transformers",
            {"bits": 4},
            {"layout": "auto_round", "ranks": (8,)},
            r"transformers puts no adapters on layers in auto_round on CPU or CUDA; the nearest that works: `format=",
        ),
        (
            "vllm==0.32",
            {"bits": 3},
            {"device": "cpu", "layout": "compressed_tensors"},
            r"vllm==0\.32 has no kernel for 3 bits in compressed_tensors on CPU \(it has one for 4\); the nearest that "
            r"works: `bits=4` `format=compressed_tensors`, or `format=merged`, or `format=compressed_tensors` on "
            r"CUDA\.$",
        ),
        (
            "vllm==0.32",
            {"bits": 4},
            {"layout": "gptq_v2", "device": "cpu"},
            r"vllm==0\.32 reads 4 bits in gptq_v2 on CPU only symmetric; the nearest that works: `format="
            r"compressed_tensors`, or `format=merged`",
        ),
        (
            "vllm==0.32",
            {"bits": 3},
            {"layout": "gptq"},
            r"no kernel for 3 bits in gptq on CPU \(it has one for 4\); it has no kernel for 3 bits in gptq on CUDA "
            r"\(it has one for 4 and 8\); the nearest that works: `format=compressed_tensors`",
        ),
        (
            "vllm==0.32",
            {"bits": 3},
            {"layout": "compressed_tensors_padded"},
            r"does not read compressed_tensors_padded on CPU or CUDA; the nearest that works: `format="
            r"compressed_tensors`, or",
        ),
        (
            "vllm",
            {"bits": 3, "group_size": 16},
            {},
            r"vllm has no kernel for 3 bits in compressed_tensors on CPU \(it has one for 4\); it reads 3 bits in "
            r"compressed_tensors on CUDA with group size -1, 32, 64 and 128, not 16; the nearest that works: "
            r"`group_size=32` `format=compressed_tensors`, or `format=merged`\.",
        ),
        (
            "gptqmodel",
            {"bits": 3},
            {"layout": "gptq"},
            r"gptqmodel reads 3 bits in gptq on CPU or CUDA only symmetric; the nearest that works: `format="
            r"gptq_v2`\.$",
        ),
        (
            "gptqmodel",
            {"bits": 4},
            {"layout": "merged"},
            r"gptqmodel does not read merged on CPU or CUDA; the nearest that works: `format=gptq_v2`\.$",
        ),
        (
            "sglang==0.5.23",
            {"bits": 2},
            {"device": "cuda", "layout": "compressed_tensors"},
            r"no kernel for 2 bits .* on CUDA \(it has one for 4 and 8\); the nearest that works: `format=gptq_v2`, or "
            r"`format=merged`",
        ),
        (
            "sglang",
            {"bits": 8, "group_size": -1},
            {"device": "cuda"},
            r"reads 8 bits in compressed_tensors on CUDA only symmetric; the nearest that works: `group_size=256` "
            r"`format=gptq_v2`, or `format=merged`",
        ),
    ],
)
def test_refused_with_reason_and_nearest_choice(target, grid, options, message) -> None:
    with pytest.raises(UsageError, match=message):
        ask(target, make_specs(**grid), **options)


def test_refused_by_shape() -> None:
    shapes = {"a": (64, 128), "b": (96, 128)}
    specs = {name: QuantSpec(4) for name in shapes}
    message = (
        r"needs inputs in multiples of 128 and outputs in multiples of 64 for compressed_tensors on CUDA, and b has "
        r"128 inputs and 96 outputs; the nearest that works: `format=gptq_v2`, or `format=merged`, or `format=gptq` on "
        r"CPU\."
    )
    with pytest.raises(UsageError, match=message):
        ask("sglang", specs, shapes=shapes, layout="compressed_tensors", device="cuda")


@pytest.mark.parametrize("target", ["vllm==0.32", "sglang"])
def test_fused_projections_need_one_grid(target: str) -> None:
    specs = make_specs(q_proj=QuantSpec(4, 128))
    message = (
        r"computes q_proj, k_proj and v_proj as one layer with one grid, and model\.layers\.0\.self_attn has 4-bit "
        r"asymmetric group 128 and 4-bit asymmetric group 64 there; the nearest that works: one grid for all modules "
        r"`format=compressed_tensors`, or `format=merged`\."
    )
    with pytest.raises(UsageError, match=message):
        ask(target, specs)


def test_fused_projections_are_quantized_together() -> None:
    specs = {module: spec for module, spec in make_specs().items() if not module.endswith("up_proj")}
    with pytest.raises(UsageError, match=r"gate_proj and up_proj as one layer .* 4-bit asymmetric group 64 and float"):
        ask("vllm==0.32", specs)
    # A plain checkpoint has no grids, and engines that fuse nothing do not mind.
    assert ask("vllm==0.32", specs, layout="merged").layout == "merged"
    assert ask("transformers", specs).layout == "compressed_tensors"


def test_own_grids_outside_of_fused_layers() -> None:
    own = QuantSpec(4, 128, symmetric=True)
    down = make_specs(symmetric=True, down_proj=own)
    assert ask("vllm==0.32", down, layout="gptq_v2").devices == ("cpu", "cuda")
    fused = make_specs(symmetric=True, q_proj=own, k_proj=own, v_proj=own)
    assert ask("vllm==0.32", fused, layout="compressed_tensors").devices == ("cpu", "cuda")
    message = (
        r"reads one grid for the modules that it fuses in gptq_v2 on CPU or CUDA, and model\.layers\.0\.self_attn\."
        r"q_proj has 4-bit symmetric group 128 where most have 4-bit symmetric group 64; the nearest that works: "
        r"`format=compressed_tensors`"
    )
    with pytest.raises(UsageError, match=message):
        ask("vllm==0.32", fused, layout="gptq_v2")


def test_one_grid_for_all_modules() -> None:
    message = r"reads one grid for all modules in gptq_v2 on CPU or CUDA, and .*down_proj has 8-bit"
    with pytest.raises(UsageError, match=message):
        ask("transformers", make_specs(down_proj=QuantSpec(8)), layout="gptq_v2")
    assert ask("gptqmodel", make_specs(down_proj=QuantSpec(8))).layout == "gptq_v2"
    partly = {module: spec for module, spec in make_specs().items() if not module.endswith("o_proj")}
    with pytest.raises(UsageError, match=r"reads one grid for all modules .*o_proj has float where most have 4-bit"):
        ask("transformers", partly, layout="gptq_v2")


def test_every_module_must_pass() -> None:
    specs = make_specs(down_proj=QuantSpec(3))
    with pytest.raises(UsageError, match=r"no kernel for 3 bits in compressed_tensors on CPU"):
        ask("vllm==0.32", specs, device="cpu")
    assert ask("vllm==0.32", specs).devices == ("cuda",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, r"device 'tpu' is unknown; allowed are any, cpu and cuda"),
        ({"layout": "gptqv2"}, r"layout 'gptqv2' is unknown; allowed are .* Did you mean gptq_v2\?"),
        ({"layout": "nonsense"}, r"layout 'nonsense' is unknown; allowed are .*merged"),
        ({"shapes": {}}, r"the shape of model\.layers\.0\.mlp\.down_proj is not known"),
        ({"ranks": (0,)}, r"an adapter has rank 0; a rank is 1 or more"),
    ],
)
def test_wrong_questions(options, message) -> None:
    with pytest.raises(UsageError, match=message):
        ask("vllm==0.32", **options)


def test_nothing_to_export() -> None:
    with pytest.raises(UsageError, match="there is no quantized module to export"):
        preflight(Target("vllm"), Exported({}, {}))


def test_plugin_counts_only_where_it_is() -> None:
    for layout in ("gptq_v2", "gptq"):
        with pytest.raises(UsageError):
            ask("vllm==0.32", make_specs(bits=2), layout=layout)
        decision = ask("vllm==0.32", make_specs(bits=2), layout=layout, plugin=True)
        assert decision.devices == ("cpu", "cuda")
        assert {rule.provider for rule in decision.rules} == {"cloq_plugin"}
        assert "needs cloq-export installed in the same environment as vLLM" in " ".join(decision.notes)


def test_parts_of_a_fused_layer_may_differ_for_the_plugin() -> None:
    mixed = make_specs(bits=2) | {name: QuantSpec(4, 64) for name in SHAPES if name.endswith("q_proj")}
    assert ask("vllm==0.32", mixed, plugin=True).layout == "gptq_v2"
    with pytest.raises(UsageError, match="as one layer with one grid"):
        ask("vllm==0.32", mixed)
    partly = {name: spec for name, spec in make_specs(bits=2).items() if not name.endswith("q_proj")}
    with pytest.raises(UsageError, match=r"as one layer with one grid, and .* float"):
        ask("vllm==0.32", partly, plugin=True)


def test_stock_comes_before_the_plugin() -> None:
    decision = ask("vllm==0.32", plugin=True)
    assert {rule.provider for rule in decision.rules} == {"stock"}


@pytest.mark.parametrize("target", ["vllm==0.33", "sglang==0.5.23"])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_humming_reads_version_two_with_its_flag(target, bits) -> None:
    decision = ask(target, make_specs(bits=bits), layout="gptq_v2")
    assert decision.devices == ("cuda",)
    assert {rule.flag for rule in decision.rules} == {"--quantization humming"}
    assert any(note.startswith("on CUDA: needs --quantization humming in ") for note in decision.notes)
    symmetric = ask(target, make_specs(bits=bits, group_size=16, symmetric=True), layout="gptq")
    assert {rule.flag for rule in symmetric.rules} == {"--quantization humming"}


@pytest.mark.parametrize("target", ["vllm==0.33", "sglang==0.5.23"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_humming_is_refused_asymmetric_files_of_version_one(target, bits) -> None:
    message = (
        rf"reads {bits} bits in gptq on CUDA only symmetric \(Humming takes stored zeros as they lie, which for "
        r"version 1 is one step off; gptq_v2 is read right\); the nearest that works: `format="
    )
    with pytest.raises(UsageError, match=message):
        ask(target, make_specs(bits=bits), layout="gptq", device="cuda")


def test_asymmetric_files_of_version_one_need_the_plugin_and_no_flag() -> None:
    decision = ask("vllm==0.33", make_specs(bits=2), layout="gptq", device="cuda", plugin=True)
    assert [(rule.provider, rule.flag) for rule in decision.rules] == [("cloq_plugin", "")]
    assert (
        "not with --quantization humming, which reads asymmetric files of version 1 one step off" in decision.notes[1]
    )


def test_humming_has_no_line_per_channel() -> None:
    message = r"reads 2 bits in gptq_v2 on CUDA with group size 16, 32, 64, 128 and 256, not -1"
    with pytest.raises(UsageError, match=message):
        ask("vllm==0.33", make_specs(bits=2, group_size=-1), layout="gptq_v2", device="cuda")


def test_a_flag_holds_for_all_modules() -> None:
    # Marlin takes one group per channel and Humming does not, which alone takes 2 bits.
    mixed = make_specs(symmetric=True, down_proj=QuantSpec(2, 64, symmetric=True))
    assert {rule.flag for rule in ask("vllm==0.33", mixed, layout="gptq_v2").rules} == {"--quantization humming"}
    mixed = make_specs(group_size=-1, symmetric=True, down_proj=QuantSpec(2, 64, symmetric=True))
    message = r"reads some of the modules in gptq_v2 on CUDA only with --quantization humming, and others only without"
    with pytest.raises(UsageError, match=message):
        ask("vllm==0.33", mixed, layout="gptq_v2")
    decision = ask("vllm==0.33", mixed, layout="gptq_v2", device="cuda", plugin=True)
    assert {rule.flag for rule in decision.rules} == {""}


def test_all_versions_are_answered_by_lines_that_all_of_them_have() -> None:
    decision = ask("vllm", make_specs(bits=2), layout="gptq_v2", device="cuda", plugin=True)
    assert {rule.provider for rule in decision.rules} == {"cloq_plugin"}


def test_snippets_have_the_flag() -> None:
    for ranks in ((), (8,)):
        exported = Exported(make_specs(bits=2), SHAPES, ranks)
        by_engine = {entry["engine"]: entry for entry in load_snippets("gptq_v2", exported)}
        assert 'quantization="humming"' in by_engine["vLLM"]["snippet"]
        assert by_engine["vLLM"]["version"] == "0.33"
        assert "--quantization humming" in by_engine["SGLang"]["snippet"]
        exported = Exported(make_specs(bits=4, symmetric=True), SHAPES, ranks)
        assert not any("humming" in entry["snippet"] for entry in load_snippets("gptq_v2", exported))
