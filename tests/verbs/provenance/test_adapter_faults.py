"""Faults of adapters between training and serving, planted in an export or beside it, and the gate that names each."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from changed_exports import Fault, certify_again, double_alpha, edit_json, rewrite_pairs
from parity_reports import missed
from rich.console import Console
from tiers import slow_but

from cloq_export.artifact.provenance import PROVENANCE_NAME
from cloq_export.errors import FormatError
from cloq_export.formats.peft import read_adapter, write_adapter
from cloq_export.parity.report import missed_gates
from cloq_export.types import LoraPair
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verify import verify


def first_module(name: str) -> bool:
    return name.endswith("layers.0.mlp.up_proj")


def _swap_folders(export: Path) -> None:
    one, two = export / "adapters" / "one", export / "adapters" / "two"
    one.rename(export / "held")
    two.rename(one)
    (export / "held").rename(two)


def _swap_weights(export: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        one, two = (export / "adapters" / each / name for each in ("one", "two"))
        held = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(held)


def _serve_start(export: Path) -> None:
    start = export / "adapters" / "cloq" / "adapter_model.safetensors"
    shutil.copyfile(start, export / "adapters" / "one" / "adapter_model.safetensors")


def _turn_sign(export: Path) -> None:
    rewrite_pairs(export / "adapters" / "one", lambda _, pair: dataclasses.replace(pair, lora_B=-pair.lora_B))


def _scale_one_module(export: Path) -> None:
    def change(module: str, pair: LoraPair) -> LoraPair:
        return dataclasses.replace(pair, lora_B=pair.lora_B * 1.02) if first_module(module) else pair

    rewrite_pairs(export / "adapters" / "one", change)


def _round_to_bfloat16(export: Path) -> None:
    def change(_: str, pair: LoraPair) -> LoraPair:
        return LoraPair(pair.lora_A.to(torch.bfloat16), pair.lora_B.to(torch.bfloat16), pair.alpha)

    rewrite_pairs(export / "adapters" / "one", change)


def _exchange_factors(export: Path) -> None:
    """Write A where B belongs in a square module, transposed so that the shapes fit."""

    def change(module: str, pair: LoraPair) -> LoraPair:
        if pair.lora_A.shape[1] != pair.lora_B.shape[0]:
            return pair
        return LoraPair(pair.lora_B.T.contiguous(), pair.lora_A.T.contiguous(), pair.alpha)

    rewrite_pairs(export / "adapters" / "one", change)


def _zero_module(export: Path) -> None:
    def change(module: str, pair: LoraPair) -> LoraPair:
        return dataclasses.replace(pair, lora_B=torch.zeros_like(pair.lora_B)) if first_module(module) else pair

    rewrite_pairs(export / "adapters" / "one", change)


def _drop_module(export: Path) -> None:
    folder = export / "adapters" / "one"
    read, base = read_adapter(folder), json.loads((folder / "cloq_adapter.json").read_text())
    pairs = {module: pair for module, pair in read.pairs.items() if not first_module(module)}
    write_adapter(folder, pairs, base_model="", base_fingerprint=str(read.base_fingerprint), extra=base["extra"])


def _swap_modules(export: Path) -> None:
    read = read_adapter(export / "adapters" / "one")
    names = {"model.layers.0.mlp.up_proj": "model.layers.1.mlp.up_proj"}
    names |= {there: here for here, there in names.items()}
    rewrite_pairs(export / "adapters" / "one", lambda module, pair: read.pairs[names.get(module, module)])


def _other_numbers(export: Path) -> None:
    generator = torch.Generator().manual_seed(5)

    def change(_: str, pair: LoraPair) -> LoraPair:
        noise = 0.1 * pair.lora_A.float().std() * torch.randn(pair.lora_A.shape, generator=generator)
        return dataclasses.replace(pair, lora_A=pair.lora_A + noise.to(pair.lora_A.dtype))

    rewrite_pairs(export / "adapters" / "two", change)


def _strip_record(export: Path) -> None:
    edit_json(export / "adapters" / "one" / "cloq_adapter.json", lambda content: content.pop("extra"))


def _edit_record(export: Path) -> None:
    edit_json(export / PROVENANCE_NAME, lambda content: content.update(source_fingerprint="sha256:" + "0" * 64))


def _edit_adapter_record(export: Path) -> None:
    edit_json(
        export / "adapters" / "one" / "cloq_adapter.json",
        lambda content: content["extra"]["provenance"]["training"].update(kept_loss=0.0),
    )


def _other_version(export: Path) -> None:
    edit_json(export / PROVENANCE_NAME, lambda content: content.update(format_version=99))


def _delete_record(export: Path) -> None:
    (export / PROVENANCE_NAME).unlink()


def _leave_out_modules(export: Path) -> None:
    edit_json(
        export / "adapters" / "one" / "adapter_config.json", lambda content: content.update(target_modules=["q_proj"])
    )


def _leave_out_by_pattern(export: Path) -> None:
    """PEFT takes the modules whose whole name matches."""
    edit_json(
        export / "adapters" / "one" / "adapter_config.json",
        lambda content: content.update(target_modules=r"model\.layers\.1\..*"),
    )


def _unreadable_pattern(export: Path) -> None:
    edit_json(
        export / "adapters" / "one" / "adapter_config.json",
        lambda content: content.update(target_modules=r"(?P<x>a)(?P=x)"),
    )


def _delete_adapter(export: Path) -> None:
    shutil.rmtree(export / "adapters" / "one")


def _declare_any_error(export: Path) -> None:
    _round_to_bfloat16(export)
    edit_json(
        export / "adapters" / "one" / "cloq_adapter.json",
        lambda content: content["extra"].update(largest_product_error=0.9, split="balanced"),
    )


BEFORE_CERTIFICATION: dict[str, tuple[Fault, str]] = {
    "folders of two adapters exchanged": (_swap_folders, "exchanged"),
    "weights of two adapters exchanged": (_swap_weights, "its pairs are those of two"),
    "the initial adapter for the trained one": (_serve_start, "that the training started from"),
    "alpha doubled": (double_alpha, "has 2 times the product"),
    "B with another sign": (_turn_sign, "has -1 times the product"),
    "one module scaled by 1.02": (_scale_one_module, "layers.0.mlp.up_proj has 1.02 times the product"),
    "rounded to bfloat16": (_round_to_bfloat16, "was rounded after it was made"),
    "A and B exchanged": (_exchange_factors, "has A and B exchanged"),
    "a module zeroed": (_zero_module, "has a product of zero"),
    "a module left out": (_drop_module, "lacks the pairs of model.layers.0.mlp.up_proj"),
    "two modules exchanged": (_swap_modules, "has other numbers"),
    "other numbers": (_other_numbers, "has other numbers"),
    "the adapter's record taken away": (_strip_record, "its folder holds no record"),
    "the record edited": (_edit_record, "was edited after it was written"),
    "the adapter's record edited": (_edit_adapter_record, "was edited after it was written"),
    "the record of another version": (_other_version, "is of version 99"),
    "an adapter deleted": (_delete_adapter, "the export was written with it, and it is not there"),
    "a cost declared that no form has": (_declare_any_error, "was rounded after it was made"),
    "the record deleted": (_delete_record, "the record that the certificate speaks of is missing"),
}


@pytest.mark.parametrize(
    "fault",
    slow_but(
        BEFORE_CERTIFICATION,
        *("folders of two adapters exchanged", "the initial adapter for the trained one", "rounded to bfloat16"),
        *("the record edited", "an adapter deleted", "the record deleted"),
    ),
)
def test_a_fault_before_certification_is_named(fault: str, copy: Path, options: VerifyOptions, silent: Console) -> None:
    plant, named = BEFORE_CERTIFICATION[fault]
    plant(copy)
    certify_again(copy)
    report = verify(copy, options, console=silent)
    assert "certificate" not in missed(report)
    assert "provenance" in missed(report)
    assert named in str(missed_gates(report))


@pytest.mark.parametrize(
    ("plant", "named"),
    [
        (_leave_out_modules, r"target_modules leaves out model\.layers\.0"),
        (_leave_out_by_pattern, r"target_modules leaves out model\.layers\.0"),
        (_unreadable_pattern, r"the pattern .* is not read"),
    ],
)
def test_pairs_that_the_config_leaves_out_are_refused_when_they_are_read(
    plant: Fault, named: str, copy: Path, options: VerifyOptions, silent: Console
) -> None:
    plant(copy)
    certify_again(copy)
    with pytest.raises(FormatError, match=named):
        verify(copy, options, console=silent)


OUTSIDE: dict[str, tuple[Callable[[Path, Path], tuple[str, ...]], str]] = {
    "the initial adapter under the trained one's name": (
        lambda run, _: (f"one={run / 'adapters' / 'cloq'}",),
        "its folder holds the adapter that the export has as cloq",
    ),
    "two names exchanged": (
        lambda run, _: (f"one={run / 'adapters' / 'two'}", f"two={run / 'adapters' / 'one'}"),
        "its folder holds the adapter that the export has as two",
    ),
    "two new names exchanged": (
        lambda run, place: tuple(f"{name}={place / name}" for name in _renamed_and_exchanged(run, place)),
        "has other numbers",
    ),
    "alpha doubled": (lambda run, place: (f"mine={_outside(run, place, double_alpha)}",), "has 2 times the product"),
    "rounded to bfloat16": (
        lambda run, place: (f"mine={_outside(run, place, _round_to_bfloat16)}",),
        "was rounded after it was made",
    ),
    "A and B exchanged": (
        lambda run, place: (f"mine={_outside(run, place, _exchange_factors)}",),
        "has A and B exchanged",
    ),
    "a module zeroed": (lambda run, place: (f"mine={_outside(run, place, _zero_module)}",), "a product of zero"),
    "a module left out": (lambda run, place: (f"mine={_outside(run, place, _drop_module)}",), "lacks the pairs"),
    "the record taken away": (
        lambda run, place: (f"mine={_outside(run, place, _strip_record)}",),
        "carries no record of how it was made",
    ),
    "the record edited": (
        lambda run, place: (f"mine={_outside(run, place, _edit_adapter_record)}",),
        "was edited after it was written",
    ),
    "the initial weights in the trained one's folder": (
        lambda run, place: (f"mine={_outside(run, place, _serve_start)}",),
        "that the training started from",
    ),
}


def _outside(run: Path, place: Path, fault: Fault) -> Path:
    shutil.copytree(run / "adapters", place / "adapters")
    fault(place)
    return place / "adapters" / "one"


def _renamed_and_exchanged(run: Path, place: Path) -> tuple[str, ...]:
    for source, target in (("one", "x"), ("two", "y")):
        shutil.copytree(run / "adapters" / source, place / target)
    held = (place / "x" / "adapter_model.safetensors").read_bytes()
    shutil.copyfile(place / "y" / "adapter_model.safetensors", place / "x" / "adapter_model.safetensors")
    (place / "y" / "adapter_model.safetensors").write_bytes(held[:-2] + held[-2:])
    rewrite_pairs(place / "y", lambda _, pair: dataclasses.replace(pair, lora_A=pair.lora_A.flip(0)))
    return "x", "y"


@pytest.mark.parametrize(
    "fault",
    slow_but(
        OUTSIDE,
        *("two names exchanged", "two new names exchanged", "alpha doubled", "a module left out"),
        *("the record taken away", "the initial weights in the trained one's folder"),
    ),
)
def test_an_adapter_outside_the_export_is_held_to_its_own_record(
    fault: str, run: Path, exported: Path, options: VerifyOptions, silent: Console, tmp_path: Path
) -> None:
    plant, named = OUTSIDE[fault]
    adapters = plant(run, tmp_path)
    report = verify(exported, dataclasses.replace(options, adapters=adapters), console=silent)
    assert "provenance" in missed(report)
    assert named in str(missed_gates(report))
