"""How the tuned kernels choose their shape: a small space, measured once per problem, kept in Triton's cache folder."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
import triton

from cloq_export.kernels.gpu import cuda

# Triton decides this when a kernel is declared: under the interpreter nothing can be timed, and shapes are kept small.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def on_its_device(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Return the function with the device of its first tensor made the current one, where Triton launches."""

    @functools.wraps(function)
    def launch(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with cuda().launching_on(cast(torch.Tensor, args[0])):
            return function(*args, **kwargs)

    return launch


def tuned(space: list[dict[str, Any]], key: list[str]) -> Callable[[Any], Any]:
    """Return the decorator that lets Triton choose among launch shapes and remember the choice on disk.

    Args:
        space: constexpr arguments of the kernel, with `num_warps` and `num_stages`; the first is what the interpreter
            runs.
        key: arguments of the kernel that tell problems apart.
    """
    configs = [
        triton.Config(
            {name: value for name, value in shape.items() if name not in ("num_warps", "num_stages")},
            num_warps=shape["num_warps"],
            num_stages=shape["num_stages"],
        )
        for shape in (space[:1] if INTERPRETED else space)
    ]
    return triton.autotune(configs=configs, key=key, cache_results=True)
