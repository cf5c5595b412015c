"""Run by test_humming.py with humming-kernels on its path: what Humming makes of the tensors of GPTQ files.

The folder given holds cases.json (case -> bits, group_size, symmetric, packing) and <case>.safetensors (the tensors of
one layer as a file holds them). Left behind are <case>.read.safetensors: Humming's own weight, scale and zero point,
before anything is rearranged for a GPU. Nothing of the package under test is imported here.
"""

import json
import sys
from pathlib import Path

import torch
from humming.schema.autoround import AutoRoundWeightSchema
from humming.schema.gptq import GPTQWeightSchema
from safetensors.torch import load_file, save_file


def main(folder: Path) -> None:
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        grid = {"bits": case["bits"], "group_size": case["group_size"], "sym": case["symmetric"]}
        if case["packing"] == "gptq":
            schema = GPTQWeightSchema(**grid)
        else:
            schema = AutoRoundWeightSchema(**grid, packing_format=case["packing"])
        tensors = load_file(folder / f"{name}.safetensors")
        # The conversion itself; `convert_humming` does no more than to choose a GPU around it.
        _, read = schema._convert_humming(tensors, [], [], torch.float16)
        save_file({part: tensor.contiguous() for part, tensor in read.items()}, folder / f"{name}.read.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
