"""What a target that takes an export asks of its user: flags, ranks, notes and snippets."""

from __future__ import annotations

import itertools
import json

import pytest
from asked_targets import SHAPES, SIZES, ask, make_specs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloq_export.errors import UsageError
from cloq_export.formats.targets.preflight import preflight
from cloq_export.formats.targets.snippets import load_snippets
from cloq_export.formats.targets.table import Exported, Target, read_table
from cloq_export.types import QuantSpec


@pytest.mark.parametrize(
    ("target", "note"),
    [
        ("vllm==0.34.1", "vllm 0.34.1 is not in the table of targets; it is taken for 0.33, the newest before it"),
        ("gptqmodel==7.5", "gptqmodel 7.5 is not in the table of targets; it is taken for 7.3, the newest before it"),
    ],
)
def test_versions_after_the_first_known_one_are_taken_with_a_note(target, note) -> None:
    assert ask(target).notes[0] == note


@pytest.mark.parametrize(("ranks", "needed"), [((64,), 64), ((4,), 8), ((17, 4), 32), ((300,), 320), ((512,), 512)])
def test_max_lora_rank_of_vllm(ranks, needed) -> None:
    decision = ask("vllm==0.32", ranks=ranks)
    assert decision.max_lora_rank == needed
    assert decision.pad_rank is None
    assert f"adapters of rank {max(ranks)} need --max-lora-rank {needed} in vLLM" in decision.notes


def test_rank_too_large() -> None:
    message = r"an adapter has rank 600; vllm==0\.32 takes up to 512: make it with `rank=512`\."
    with pytest.raises(UsageError, match=message):
        ask("vllm==0.32", ranks=(8, 600))


def test_ranks_of_their_own_are_padded_for_sglang() -> None:
    decision = ask("sglang", ranks=(8, 20))
    assert (decision.max_lora_rank, decision.pad_rank) == (20, 20)
    assert any("`pad_rank=20`" in note for note in decision.notes)
    assert ask("sglang", ranks=(20,)).pad_rank is None


def test_peft_takes_any_rank() -> None:
    decision = ask("transformers", ranks=(8, 700))
    assert (decision.max_lora_rank, decision.pad_rank) == (None, None)


def test_notes_say_what_was_not_run() -> None:
    notes = ask("vllm==0.32").notes
    assert "on CUDA: known from the source of vLLM, not run" in notes
    assert not any(note.startswith("on CPU") and "not run" in note for note in notes)


def test_notes_name_packages() -> None:
    notes = ask("transformers", make_specs(bits=3)).notes
    assert "on CPU and CUDA: needs compressed-tensors>=0.18 beside Transformers" in notes
    notes = ask("transformers", make_specs(bits=3), layout="gptq_v2").notes
    assert "on CPU and CUDA: needs optimum>=2.3 and gptqmodel>=7.3 beside Transformers" in notes


def test_snippets_of_compressed_tensors() -> None:
    entries = load_snippets("compressed_tensors", Exported(make_specs(bits=3), SHAPES, ranks=(48,)), folder="me/model")
    assert [(entry["engine"], entry["version"], entry["device"]) for entry in entries] == [
        ("vLLM", "0.32 to 0.33", "CUDA"),
        ("Transformers", "5.19 to 5.24", "CPU, CUDA"),
    ]
    vllm, transformers = (entry["snippet"] for entry in entries)
    assert 'LLM("me/model"' in vllm
    assert "max_lora_rank=64" in vllm
    assert "CompressedTensorsConfig(dequantize=True)" in transformers
    assert "PeftModel.from_pretrained(model," in transformers


def test_snippets_without_an_adapter() -> None:
    entries = load_snippets("gptq_v2", Exported(make_specs(), SHAPES))
    assert [entry["engine"] for entry in entries] == ["vLLM", "Transformers", "GPTQModel", "SGLang"]
    assert not any("Peft" in entry["snippet"] for entry in entries)


def test_snippet_forces_the_kernel_that_works() -> None:
    entries = load_snippets("gptq_v2", Exported(make_specs(group_size=16), SHAPES))
    by_device = {(entry["engine"], entry["device"]): entry["snippet"] for entry in entries}
    assert "GPTQ_TORCH" in by_device["GPTQModel", "CPU"]
    assert "GPTQ_TORCH" not in by_device["GPTQModel", "CUDA"]


@pytest.mark.parametrize("layout", ["compressed_tensors", "compressed_tensors_padded", "gptq", "gptq_v2", "merged"])
def test_python_snippets_compile(layout: str) -> None:
    for bits, symmetric, ranks in itertools.product((2, 3, 4, 8), (True, False), ((), (8,))):
        for entry in load_snippets(layout, Exported(make_specs(bits, 64, symmetric), SHAPES, ranks)):
            assert "$" not in entry["snippet"]
            json.dumps(entry)
            if entry["language"] == "python":
                compile(entry["snippet"], "snippet", "exec")
            else:
                assert entry["language"] == "sh"


def test_snippet_refuses_a_path_that_needs_quoting() -> None:
    with pytest.raises(UsageError, match="holds characters that need quoting"):
        load_snippets("merged", Exported(make_specs(), SHAPES), folder='a"; rm -rf b')


GRIDS = st.builds(
    QuantSpec,
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([-1, 8, 16, 32, 64, 128, 256]),
    symmetric=st.booleans(),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    target=st.sampled_from(
        [Target(name, version) for name, engine in read_table().engines.items() for version in (None, *engine.versions)]
    ),
    common=GRIDS,
    own=st.dictionaries(st.sampled_from([name.rpartition(".")[2] for name in SIZES]), GRIDS, max_size=2),
    device=st.sampled_from(["any", "cpu", "cuda"]),
    plugin=st.booleans(),
)
def test_what_is_chosen_is_accepted_by_name(target, common, own, device, plugin) -> None:
    specs = make_specs(common.bits, common.group_size, common.symmetric, **own)
    exported = Exported(specs, SHAPES, plugin=plugin)

    def decide(layout=None):
        try:
            return preflight(target, exported, layout=layout, device=device), ""
        except UsageError as error:
            return None, str(error)

    chosen, message = decide()
    by_name = {layout: decide(layout)[0] for layout in read_table().engines[target.name].layouts if layout != "merged"}
    if chosen is None:
        assert message.startswith(str(target))
        assert message.endswith(".")
        assert "\n" not in message
        assert set(by_name.values()) == {None}
        return
    assert by_name[chosen.layout] == chosen
    assert all(len(other.devices) <= len(chosen.devices) for other in by_name.values() if other is not None)
