"""Quantized formats that are recognised by name and not read, and what to do with such a file."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cloq_export.formats.layout import Headers

_AGAIN = "start from the float model (cloq run MODEL), or fetch it as gptq_v2 or compressed-tensors pack-quantized"

# quant_method -> (what it is, what to do); the methods of transformers' own list and those of GPTQModel.
UNREAD_METHODS: Mapping[str, tuple[str, str]] = {
    "awq": (
        "AWQ, whose words run along the outputs in the order 0 2 4 6 1 3 5 7",
        "convert it with llm-compressor or GPTQModel to gptq_v2 or pack-quantized, or " + _AGAIN,
    ),
    "auto-round": ("AutoRound", "export it again with AutoRound's own format auto_gptq or llm_compressor"),
    "bitsandbytes": ("bitsandbytes, NF4, FP4 or row-wise int8", _AGAIN),
    "hqq": ("HQQ, whose words hold rows that lie far apart, the highest bits first", _AGAIN),
    "gguf": ("GGUF", "give it to cloq run as a model: GGUF files are read as float originals"),
    "fp8": ("8-bit floats", _AGAIN),
    "fbgemm_fp8": ("8-bit floats of FBGEMM", _AGAIN),
    "modelopt": ("NVIDIA ModelOpt (FP8 or NVFP4)", _AGAIN),
    "nvfp4": ("NVFP4, 4-bit floats in blocks of 16", _AGAIN),
    "fp_quant": ("FP-Quant, 4-bit floats", _AGAIN),
    "mxfp4": ("MXFP4, 4-bit floats in blocks of 32", _AGAIN),
    "mxfp8": ("MXFP8, 8-bit floats in blocks of 32", _AGAIN),
    "aqlm": ("AQLM, additive code books", _AGAIN),
    "vptq": ("VPTQ, vector code books", _AGAIN),
    "quip": ("QuIP#, lattice code books", _AGAIN),
    "spqr": ("SpQR, sparse outliers beside codes", _AGAIN),
    "higgs": ("HIGGS, vector grids", _AGAIN),
    "exl2": ("EXL2 of ExLlamaV2", _AGAIN),
    "exl3": ("EXL3 of ExLlamaV3", _AGAIN),
    "quanto": ("Quanto", _AGAIN),
    "torchao": ("torchao", _AGAIN),
    "eetq": ("EETQ, 8-bit rows in tiles", _AGAIN),
    "quark": ("AMD Quark", _AGAIN),
    "bitnet": ("BitNet, ternary", _AGAIN),
    "qqq": ("QQQ, 4-bit weights in Marlin tiles", _AGAIN),
    "marlin": ("Marlin tiles, 4 bits shuffled for one kernel", _AGAIN),
    "paroquant": ("ParoQuant, rotated AWQ", _AGAIN),
    "sinq": ("SINQ", _AGAIN),
    "metal": ("MLX words for Metal", _AGAIN),
}

# checkpoint_format of quant_method gptq or awq -> what it is, and what to do.
UNREAD_GPTQ_FORMATS: Mapping[str, tuple[str, str]] = {
    "gptq_p": (
        "GPTQModel's planar order: the same shapes, 3-bit codes split into planes",
        "convert it to gptq_v2 with GPTQModel",
    ),
    "marlin": UNREAD_METHODS["marlin"],
    "bitblas": ("BitBLAS, words laid out for one kernel", _AGAIN),
    "qqq": UNREAD_METHODS["qqq"],
    "gemm": UNREAD_METHODS["awq"],
    "gemv": UNREAD_METHODS["awq"],
    "gemv_fast": UNREAD_METHODS["awq"],
    "llm-awq": UNREAD_METHODS["awq"],
    "exl2": UNREAD_METHODS["exl2"],
    "exl3": UNREAD_METHODS["exl3"],
}

# format of quant_method compressed-tensors -> what it is.
UNREAD_COMPRESSED_TENSORS: Mapping[str, str] = {
    "int-quantized": "8-bit integers, one to a byte",
    "naive-quantized": "values one to a byte",
    "float-quantized": "8-bit floats",
    "nvfp4-pack-quantized": "NVFP4, 4-bit floats in blocks of 16",
    "mxfp4-pack-quantized": "MXFP4, 4-bit floats in blocks of 32",
    "mxfp8-quantized": "MXFP8, 8-bit floats in blocks of 32",
    "marlin-24": "2:4 sparse 4-bit codes in Marlin tiles",
    "mixed-precision": "several formats in one file",
    "sparse-24-bitmask": "2:4 sparse floats",
    "sparse-bitmask": "sparse floats",
    "dense": "plain floats",
}

# Parts of tensor names that only one format has -> its quant_method above. The order counts.
_SIGNS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), method)
    for pattern, method in (
        (r"\.quant_state\.bitsandbytes__|\.SCB$", "bitsandbytes"),
        (r"\.q_perm$|\.q_scale_max$", "exl2"),
        (r"\.trellis$", "exl3"),
        (r"\.W_q$", "hqq"),
        (r"\.codebooks$", "aqlm"),
        (r"\.Qidxs$", "quip"),
        (r"\.centroids(\.weight)?$", "vptq"),
        (r"\.weight_scale_inv$", "fp8"),
        (r"\.weight_global_scale$|\.weight_scale_2$", "nvfp4"),
        (r"_blocks$", "mxfp4"),
    )
)


def method_by_tensors(headers: Headers) -> str | None:
    """Return the unread method that tensor names and dtypes show, or None.

    Args:
        headers: of all tensors of a checkpoint.

    Returns:
        str or None: a key of `UNREAD_METHODS`.
    """
    for pattern, method in _SIGNS:
        if any(pattern.search(name) for name in headers):
            # gpt-oss names its scales beside the blocks; another name that ends so is no MXFP4.
            if method == "mxfp4" and not any(name.endswith("_scales") for name in headers):
                continue
            return method
    if any(name.endswith(".B") and f"{name[:-1]}s" in headers for name in headers):
        return "marlin"
    if any(name.endswith(".biases") and f"{name[:-6]}scales" in headers for name in headers):
        return "metal"
    if any(code.startswith("F8_") and name.endswith(".weight") for name, (code, _) in headers.items()):
        return "fp8"
    return None
