"""Write the golden adapter with nothing but the standard library, following SPEC.md.

Run `python generate.py` to write the files again beside this script.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

BASE_MODEL = "tiny-llama"
BASE_FINGERPRINT = "sha256:" + "0123456789abcdef" * 4

# module -> (rank, alpha, in, out)
MODULES = {
    "model.layers.0.self_attn.q_proj": (2, 2.0, 8, 4),
    "model.layers.0.mlp.down_proj": (1, 3.0, 4, 8),
    "model.layers.1.self_attn.q_proj": (2, 2.0, 8, 4),
}

CONFIG = """\
{
  "peft_type": "LORA",
  "task_type": "CAUSAL_LM",
  "base_model_name_or_path": "tiny-llama",
  "r": 2,
  "lora_alpha": 2,
  "lora_dropout": 0.0,
  "target_modules": [
    "model.layers.0.mlp.down_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj"
  ],
  "rank_pattern": {
    "model.layers.0.mlp.down_proj": 1
  },
  "alpha_pattern": {
    "model.layers.0.mlp.down_proj": 3
  },
  "bias": "none",
  "fan_in_fan_out": false,
  "inference_mode": true,
  "init_lora_weights": true,
  "modules_to_save": null,
  "use_dora": false,
  "use_rslora": false
}
"""

BINDING = f"""\
{{
  "base_fingerprint": "{BASE_FINGERPRINT}",
  "base_model": "{BASE_MODEL}",
  "format": "cloq-adapter",
  "format_version": 1
}}
"""


def matrix(rows: int, columns: int) -> list[list[float]]:
    """Return a matrix whose entry k, counted row by row, is (k mod 7 - 3) / 8."""
    return [[((row * columns + column) % 7 - 3) / 8 for column in range(columns)] for row in range(rows)]


def golden_files() -> dict[str, bytes]:
    """Return file name -> content of the golden adapter."""
    matrices = {}
    for module, (rank, _, columns, rows) in MODULES.items():
        matrices[f"base_model.model.{module}.lora_A.weight"] = matrix(rank, columns)
        matrices[f"base_model.model.{module}.lora_B.weight"] = matrix(rows, rank)
    header: dict[str, object] = {
        "__metadata__": {
            "cloq_base_fingerprint": BASE_FINGERPRINT,
            "cloq_format_version": "1",
            "format": "pt",
        }
    }
    body = b""
    for name in sorted(matrices):
        flat = [value for row in matrices[name] for value in row]
        data = struct.pack(f"<{len(flat)}e", *flat)
        header[name] = {
            "dtype": "F16",
            "shape": [len(matrices[name]), len(matrices[name][0])],
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return {
        "adapter_config.json": CONFIG.encode("ascii"),
        "adapter_model.safetensors": struct.pack("<Q", len(text)) + text + body,
        "cloq_adapter.json": BINDING.encode("ascii"),
    }


if __name__ == "__main__":
    folder = Path(__file__).parent / "adapter"
    folder.mkdir(exist_ok=True)
    for file_name, content in golden_files().items():
        (folder / file_name).write_bytes(content)
