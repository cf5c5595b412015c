"""The engines that `kernels_cpu.py` times, each on the same layer and input."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

GROUP = 64
CHECKED_TOKENS = 4
Cell = dict[str, Any]
Call = Callable[[], Any]


class Problem:
    """One layer and its input, the same in every process: codes, scales, zeros and x from a seed."""

    def __init__(self, out: int, columns: int, tokens: int, bits: int) -> None:
        import numpy

        random = numpy.random.default_rng((out, columns, tokens, bits))
        groups = columns // GROUP
        self.bits, self.out, self.columns, self.tokens = bits, out, columns, tokens
        self.codes = random.integers(0, 1 << bits, (out, columns), dtype=numpy.uint8)
        # Scales that are exact in float16 and bfloat16: every engine then has the same weights.
        self.scales = (random.integers(128, 256, (out, groups)) / 8192).astype(numpy.float32)
        self.zeros = random.integers(0, 1 << bits, (out, groups), dtype=numpy.uint8)
        self.x = random.standard_normal((tokens, columns), dtype=numpy.float32)
        self.x = (self.x.view(numpy.uint32) & 0xFFFF0000).view(numpy.float32)  # exact in bfloat16

    def weight(self) -> Any:
        """Return Q, (out, in) float32, exact."""
        import numpy

        grouped = self.codes.reshape(self.out, -1, GROUP).astype(numpy.float32)
        return ((grouped - self.zeros[..., None]) * self.scales[..., None]).reshape(self.out, self.columns)

    def error(self, y: Any) -> float:
        """Return the relative error of the first tokens of a result, in the Frobenius norm."""
        import numpy

        difference = y[: self.truth.shape[0]].astype(numpy.float64) - self.truth
        return float(numpy.linalg.norm(difference) / numpy.linalg.norm(self.truth))

    @functools.cached_property
    def truth(self) -> Any:
        """Return the first tokens of x Q^T in float64."""
        import numpy

        rows = self.x[: min(self.tokens, CHECKED_TOKENS)].astype(numpy.float64)
        return rows @ self.weight().astype(numpy.float64).T

    def packed_bytes(self) -> int:
        """Return the bytes of codes, float16 scales and zeros of a byte."""
        return self.codes.size * self.bits // 8 + self.scales.size * 3


def cloq_cells(problem: Problem, job: dict[str, Any]) -> Iterator[tuple[str, str, str, Call, list[Call]]]:
    """Yield torch's float layers and ours: engine, activations, precision, result, calls to time."""
    import torch

    from cloq_export.kernels.cpu import linear as kernel
    from cloq_export.kernels.cpu import lora as cpu_lora
    from cloq_export.kernels.cpu import weight as cpu_weight

    torch.set_grad_enabled(False)
    x = torch.from_numpy(problem.x)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if problem.bits == job["bits"][0]:  # float layers know no width
        for name, dtype in dtypes.items():
            dense, given = torch.from_numpy(problem.weight()).to(dtype), x.to(dtype)
            call = bind(torch.nn.functional.linear, given, dense)
            yield "torch", name, "float", _as_numpy(call), [call]
    weight = cpu_weight.pack_weight(
        torch.from_numpy(problem.codes),
        torch.from_numpy(problem.scales).to(torch.float16),
        torch.from_numpy(problem.zeros),
        problem.bits,
    )
    ring: list[Any] = []
    if job["cold_bytes"] and problem.tokens == 1:
        ring = [_copy_of(weight) for _ in range(-(-job["cold_bytes"] // problem.packed_bytes()))]
    lora = cpu_lora.pack_lora(
        torch.zeros(1, job["rank"], problem.columns, dtype=torch.bfloat16),
        torch.zeros(1, problem.out, job["rank"], dtype=torch.bfloat16),
        torch.ones(1),
    )
    for name, dtype in dtypes.items():
        given = x.to(dtype)
        for precision in ("exact", "int8"):
            call = bind(kernel.linear, given, weight, precision=precision)
            yield "cloq", name, precision, _as_numpy(call), [call]
            if ring:
                calls = [bind(kernel.linear, given, each, precision=precision) for each in ring]
                yield "cloq cold", name, precision, _as_numpy(call), calls
        call = bind(kernel.lora_linear, given, weight, None, lora)
        yield f"cloq + rank {job['rank']}", name, "exact", _as_numpy(call), [call]


def vllm_cells(problem: Problem, job: dict[str, Any]) -> Iterator[tuple[str, str, str, Call, list[Call]]]:
    """Yield vLLM's stock int4 kernels, with its own preparation of the weights."""
    if problem.bits != 4:
        return
    import torch
    from vllm.model_executor.kernels.linear.mixed_precision import MPLinearLayerConfig
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
    from vllm.scalar_type import scalar_types

    torch.set_grad_enabled(False)
    torch.cpu._init_amx()  # type: ignore[attr-defined]  # as vLLM's worker does; its kernels crash without it
    out, columns = problem.out, problem.columns
    for precision in ("exact", "int8"):
        os.environ["VLLM_CPU_INT4_W4A8"] = "1" if precision == "int8" else "0"
        layer = torch.nn.Module()
        layer.register_parameter("bias", None)
        shifts = torch.arange(0, 32, 4)
        words = (
            torch.from_numpy(problem.codes).t().reshape(columns // 8, 8, out).to(torch.int64) << shifts[:, None]
        ).sum(1)
        zeros = (torch.from_numpy(problem.zeros).t().reshape(-1, out // 8, 8).to(torch.int64) << shifts).sum(2)
        parts = {
            "qweight": (words.to(torch.int32), {"input_dim": 0, "output_dim": 1, "packed_dim": 0}),
            "qzeros": (zeros.to(torch.int32), {"input_dim": 0, "output_dim": 1, "packed_dim": 1}),
            "scales": (torch.from_numpy(problem.scales).t().contiguous().bfloat16(), {"input_dim": 0, "output_dim": 1}),
        }
        for name, (tensor, attributes) in parts.items():
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            vars(parameter).update(attributes)
            layer.register_parameter(name, parameter)
        config = MPLinearLayerConfig(
            full_weight_shape=(columns, out),
            partition_weight_shape=(columns, out),
            weight_type=scalar_types.uint4,
            act_type=torch.bfloat16,
            group_size=GROUP,
            zero_points=True,
        )
        kernel = CPUWNA16LinearKernel(config, "qweight", "scales", "qzeros")
        kernel.process_weights_after_loading(layer)
        call = bind(kernel.apply_weights, layer, torch.from_numpy(problem.x).bfloat16())
        yield "vllm", "bfloat16", precision, _as_numpy(call), [call]


def onnxruntime_cells(problem: Problem, job: dict[str, Any]) -> Iterator[tuple[str, str, str, Call, list[Call]]]:
    """Yield ONNX Runtime's MatMulNBits at accuracy levels 1 (float32) and 4 (8-bit activations)."""
    if problem.bits not in (2, 4):
        return
    import numpy
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    def packed(values: Any) -> Any:
        count = 8 // problem.bits
        shifts = numpy.arange(count, dtype=numpy.uint8) * problem.bits
        return numpy.bitwise_or.reduce(values.reshape(-1, count) << shifts, axis=1).astype(numpy.uint8)

    groups = problem.columns // GROUP
    initializers = {
        "b": packed(problem.codes).reshape(problem.out, groups, -1),
        "scales": problem.scales.reshape(-1),
        "zeros": packed(problem.zeros.reshape(problem.out, -1)),
    }
    for level, precision in ((1, "exact"), (4, "int8")):
        node = helper.make_node(
            "MatMulNBits",
            ["x", *initializers],
            ["y"],
            domain="com.microsoft",
            K=problem.columns,
            N=problem.out,
            bits=problem.bits,
            block_size=GROUP,
            accuracy_level=level,
        )
        graph = helper.make_graph(
            [node],
            "layer",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", problem.columns])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", problem.out])],
            [numpy_helper.from_array(value, name) for name, value in initializers.items()],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = job["threads"]
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        call = bind(session.run, None, {"x": problem.x})
        yield "onnxruntime", "float32", precision, _first(call), [call]


def ggml_cells(problem: Problem, job: dict[str, Any]) -> Iterator[tuple[str, str, str, Call, list[Call]]]:
    """Yield the kernels of llama.cpp for its own grids Q4_1 and Q2_K, which round activations to 8 bits."""
    kind = {4: ("Q4_1", 3), 2: ("Q2_K", 10)}.get(problem.bits)  # the numbers of ggml.h
    if kind is None:
        return
    import ctypes

    import libggml
    import numpy

    class Room(ctypes.Structure):
        _fields_ = [("bytes", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_data", ctypes.c_bool)]

    class Plan(ctypes.Structure):  # its end, which grows from version to version, is not looked at
        _fields_ = [("bytes", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("rest", ctypes.c_uint8 * 128)]

    folder = Path(libggml.__file__).parent / "lib64"
    base, cpu = (ctypes.CDLL(str(folder / f"libggml-{part}.so"), ctypes.RTLD_GLOBAL) for part in ("base", "cpu"))
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64

    def function(library: Any, name: str, result: Any, *arguments: Any) -> Any:
        found = getattr(library, f"ggml_{name}")
        found.restype, found.argtypes = result, arguments
        return found

    function(cpu, "cpu_init", None)()
    problem_bytes = problem.codes.size + 8 * (problem.x.size + problem.tokens * problem.out)
    make = function(base, "init", pointer, Room)
    context = make(Room(problem_bytes + (1 << 24), None, False))
    tensor = function(base, "new_tensor_2d", pointer, pointer, number, size, size)
    data = function(base, "get_data", pointer, pointer)
    weight = tensor(context, kind[1], problem.columns, problem.out)
    dense = numpy.ascontiguousarray(problem.weight())
    quantize = function(base, "quantize_chunk", ctypes.c_size_t, number, pointer, pointer, *[size] * 3, pointer)
    quantize(kind[1], dense.ctypes.data, data(weight), 0, problem.out, problem.columns, None)
    x = tensor(context, 0, problem.columns, problem.tokens)
    ctypes.memmove(data(x), problem.x.ctypes.data, problem.x.nbytes)
    y = function(base, "mul_mat", pointer, pointer, pointer, pointer)(context, weight, x)
    graph = function(base, "new_graph", pointer, pointer)(context)
    function(base, "build_forward_expand", None, pointer, pointer)(graph, y)
    plan = function(cpu, "graph_plan", Plan, pointer, number, pointer)(graph, job["threads"], None)
    work = numpy.empty(plan.bytes + 64, dtype=numpy.uint8)
    plan.memory = work.ctypes.data
    compute = function(cpu, "graph_compute", number, pointer, pointer)
    call = bind(compute, graph, ctypes.byref(plan))
    result = numpy.ctypeslib.as_array(
        ctypes.cast(data(y), ctypes.POINTER(ctypes.c_float)), (problem.tokens, problem.out)
    )

    def computed() -> Any:
        call()
        return result.copy()

    try:
        yield f"ggml {kind[0]}", "float32", "int8", computed, [call]
    finally:
        function(base, "free", None, pointer)(context)


def bind(function: Callable[..., Any], *arguments: Any, **options: Any) -> Call:
    return lambda: function(*arguments, **options)


def _as_numpy(call: Call) -> Call:
    return lambda: call().float().numpy()


def _first(call: Call) -> Call:
    return lambda: call()[0]


def _copy_of(weight: Any) -> Any:
    import dataclasses

    tensors = {name: getattr(weight, name).clone() for name in ("words", "scales", "zeros")}
    return dataclasses.replace(weight, **tensors)
