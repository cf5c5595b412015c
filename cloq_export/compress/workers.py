"""Where the layers of a block are solved: on this device, on several, or by the workers of a Ray cluster.

The solves of one block are independent given H (CLoQ section 3), so they may run anywhere, at the same time, and in any
order; a request is everything that one of them needs, and the same function solves it everywhere. Results come back in
the order of the requests.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from cloq_export.compress.problem import SolvedLayer
from cloq_export.compress.solve import SolveRequest, solve_group
from cloq_export.errors import EngineError, MissingPackageError, UsageError
from cloq_export.files.versions import require_versions
from cloq_export.kernels.gpu import cuda
from cloq_export.recipe import Recipe

# How often a request is given to another worker after its own was lost.
_RETRIES = 3


class Workers(Protocol):
    """Solves requests."""

    def solve(self, requests: Iterable[SolveRequest]) -> Iterator[dict[str, SolvedLayer]]:
        """Yield the finished layers of each request, in the order of the requests."""


def solve_on(request: SolveRequest, device: torch.device) -> dict[str, SolvedLayer]:
    """Solve a request on a device; where its memory runs out, in smaller pieces, and say so in the certificates.

    The pieces are the layers one by one, then, on a GPU, the CPU.

    Args:
        request: what to solve.
        device: where.

    Returns:
        Full module name -> finished layer, its weight on the device.

    Raises:
        torch.OutOfMemoryError: not even the last way fits.
        SingularStatsError, NonFiniteError: as `solve_group`.
    """
    plans = request.plans
    try:
        return _solve(request, device)
    except torch.OutOfMemoryError:
        if len(plans) == 1 and device.type == "cpu":
            raise
    # Outside `except`: inside, the traceback would keep the tensors of the failed attempt alive.
    _free(device)
    if len(plans) > 1:
        try:
            single: dict[str, SolvedLayer] = {}
            for plan in plans:
                single |= _solve(request.of(plan), device)
            return _noted(single, "memory ran out: the layers that share this input were solved one by one")
        except torch.OutOfMemoryError:
            if device.type == "cpu":
                raise
        _free(device)
    solved = _noted(_solve(request, torch.device("cpu")), "device memory ran out: solved on the CPU")
    return {name: dataclasses.replace(layer, weight=layer.weight.to(device)) for name, layer in solved.items()}


@torch.no_grad()
def _solve(request: SolveRequest, device: torch.device) -> dict[str, SolvedLayer]:
    return solve_group(request.on(device))


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        cuda().release_cached()


def _noted(solved: Mapping[str, SolvedLayer], note: str) -> dict[str, SolvedLayer]:
    return {
        name: dataclasses.replace(
            layer, certificate=dataclasses.replace(layer.certificate, notes=(*layer.certificate.notes, note))
        )
        for name, layer in solved.items()
    }


class LocalWorkers:
    """Solves in this process: one request after the other on one device, side by side on several.

    Args:
        devices: at least one; requests are dealt out in turn.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = tuple(devices)

    def solve(self, requests: Iterable[SolveRequest]) -> Iterator[dict[str, SolvedLayer]]:
        """Yield the finished layers of each request, in the order of the requests."""
        if len(self._devices) == 1:
            for request in requests:
                yield solve_on(request, self._devices[0])
            return
        # One thread for each device: two requests at once would need the memory of both.
        pools = [concurrent.futures.ThreadPoolExecutor(1) for _ in self._devices]
        try:
            waiting = [
                pools[number % len(pools)].submit(solve_on, request, self._devices[number % len(pools)])
                for number, request in enumerate(requests)
            ]
            for future in waiting:
                yield future.result()
        finally:
            for pool in pools:
                pool.shutdown(cancel_futures=True)


class RayWorkers:
    """Solves on the workers of a Ray cluster: the one of RAY_ADDRESS, or one of this machine's processors.

    A worker computes with as many threads as this process and on the same kind of device, so it gives the same bytes.
    A request whose worker was lost is given to another one.

    Args:
        device: the kind of device that workers compute on.

    Raises:
        MissingPackageError: Ray is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            import ray
        except ImportError:
            raise MissingPackageError(
                "solvers=ray needs the package ray; run: pip install 'cloq-export[ray]', or take `solvers=local`."
            ) from None
        require_versions("ray")
        self._ray: Any = ray
        self._kind = device.type
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
        options = {"num_cpus": 1, "num_gpus": int(self._kind == "cuda"), "max_retries": _RETRIES}
        self._task: Any = ray.remote(**options)(_solve_remotely)

    def solve(self, requests: Iterable[SolveRequest]) -> Iterator[dict[str, SolvedLayer]]:
        """Yield the finished layers of each request, in the order of the requests.

        Raises:
            EngineError: a request's workers were lost again and again.
        """
        threads = torch.get_num_threads()
        waiting = [self._task.remote(request.on(torch.device("cpu")), self._kind, threads) for request in requests]
        for reference in waiting:
            try:
                yield self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except self._ray.exceptions.RayError as error:
                raise EngineError(
                    f"a Ray worker was lost {_RETRIES + 1} times in the same layer ({type(error).__name__}); what is "
                    "finished is kept, and the same command continues. Give workers more memory, or take "
                    "`solvers=local`."
                ) from None


def _solve_remotely(request: SolveRequest, kind: str, threads: int) -> dict[str, SolvedLayer]:
    """Solve a request in a worker; the problem, and the weight that next layers would meet, stay there unused."""
    torch.set_num_threads(threads)
    solved = solve_on(request, torch.device(kind))
    return {name: dataclasses.replace(layer, weight=torch.empty(0), problem=None) for name, layer in solved.items()}


def workers_of(recipe: Recipe, device: torch.device) -> Workers:
    """Return where the layers of a recipe are solved.

    Raises:
        UsageError: Ray was asked for, and the recipe's layers wait for each other.
        MissingPackageError: Ray was asked for and is not installed.
    """
    if recipe.solvers == "ray":
        if recipe.error_aware > 0.0:
            raise UsageError(
                f"solvers=ray spreads independent layers, but with error_aware={recipe.error_aware:g} every layer "
                "waits for the one before it; add `error_aware=0`, or `preset=paper`."
            )
        return RayWorkers(device)
    if device == torch.device("cuda"):
        return LocalWorkers([torch.device("cuda", number) for number in range(cuda().count())])
    return LocalWorkers([device])
