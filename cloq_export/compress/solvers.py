"""Where the layers of a block are solved: on this device, on several, or by the workers of a Ray cluster.

The solves of one block are independent given H (CLoQ section 3), so they may run anywhere, at the same time, and in any
order; a job is everything that one of them needs, and the same function runs it everywhere. Results come back in the
order of the jobs.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from cloq_export.compress.plan import ModulePlan
from cloq_export.compress.solve import SolvedLayer, solve_group
from cloq_export.errors import EngineError, MissingPackageError
from cloq_export.files.versions import require_versions
from cloq_export.recipe import Recipe
from cloq_export.types import LayerStats, QuantizedLayer

# How often a job is given to another worker after its own was lost.
_RETRIES = 3


@dataclasses.dataclass(frozen=True)
class SolveJob:
    """The layers that read one input, and all that their solve needs.

    Args:
        plans: the layers.
        weights: full module name -> original W, (out, in), any float dtype.
        stats: H (and D) of their input.
        recipe: every option of the run.
        kept: full module name -> codes that it keeps; None quantizes.
    """

    plans: tuple[ModulePlan, ...]
    weights: Mapping[str, torch.Tensor]
    stats: LayerStats
    recipe: Recipe
    kept: Mapping[str, QuantizedLayer] | None = None


class Solvers(Protocol):
    """Runs jobs."""

    def solve(self, jobs: Iterable[SolveJob]) -> Iterator[dict[str, SolvedLayer]]:
        """Yield the finished layers of each job, in the order of the jobs."""


def run_job(job: SolveJob, device: torch.device) -> dict[str, SolvedLayer]:
    """Solve one job on a device; where its memory runs out, in smaller pieces, and say so in the certificates.

    The pieces are the layers one by one, then, on a GPU, the CPU.

    Args:
        job: what to solve.
        device: where.

    Returns:
        Full module name -> finished layer, its weight on the device.

    Raises:
        torch.OutOfMemoryError: not even the last way fits.
        SingularStatsError, NonFiniteError: as `solve_group`.
    """
    try:
        return _solve_on(job, job.plans, device)
    except torch.OutOfMemoryError:
        if len(job.plans) == 1 and device.type == "cpu":
            raise
    # Outside of `except`, where the traceback no longer holds the tensors of the attempt.
    _free(device)
    if len(job.plans) > 1:
        try:
            single: dict[str, SolvedLayer] = {}
            for plan in job.plans:
                single |= _solve_on(job, (plan,), device)
            return _noted(single, "memory ran out: the layers that share this input were solved one by one")
        except torch.OutOfMemoryError:
            if device.type == "cpu":
                raise
        _free(device)
    solved = _noted(_solve_on(job, job.plans, torch.device("cpu")), "device memory ran out: solved on the CPU")
    return {name: dataclasses.replace(layer, weight=layer.weight.to(device)) for name, layer in solved.items()}


@torch.no_grad()
def _solve_on(job: SolveJob, plans: Sequence[ModulePlan], device: torch.device) -> dict[str, SolvedLayer]:
    weights = {plan.name: job.weights[plan.name].to(device, torch.float32) for plan in plans}
    kept = job.kept
    return solve_group(
        plans, weights, job.stats.to(device), job.recipe, None if kept is None else lambda name: kept[name]
    )


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _noted(solved: Mapping[str, SolvedLayer], note: str) -> dict[str, SolvedLayer]:
    return {
        name: dataclasses.replace(
            layer, certificate=dataclasses.replace(layer.certificate, notes=(*layer.certificate.notes, note))
        )
        for name, layer in solved.items()
    }


class LocalSolvers:
    """Solves in this process: one job after the other on one device, side by side on several.

    Args:
        devices: at least one; jobs are dealt out in turn.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = tuple(devices)

    def solve(self, jobs: Iterable[SolveJob]) -> Iterator[dict[str, SolvedLayer]]:
        """Yield the finished layers of each job, in the order of the jobs."""
        if len(self._devices) == 1:
            for job in jobs:
                yield run_job(job, self._devices[0])
            return
        # One thread a device: a device that is given two jobs at once would hold the memory of both.
        pools = [concurrent.futures.ThreadPoolExecutor(1) for _ in self._devices]
        try:
            waiting = [
                pools[number % len(pools)].submit(run_job, job, self._devices[number % len(pools)])
                for number, job in enumerate(jobs)
            ]
            for future in waiting:
                yield future.result()
        finally:
            for pool in pools:
                pool.shutdown(cancel_futures=True)


class RaySolvers:
    """Solves on the workers of a Ray cluster: the one of RAY_ADDRESS, or one of this machine's processors.

    A worker computes with as many threads as this process and on the same kind of device, so it gives the same bytes.
    A job whose worker was lost is given to another one.

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
                "solvers=ray needs the package ray; run: pip install 'cloq-export[ray]', or take solvers=local."
            ) from None
        require_versions("ray")
        self._ray: Any = ray
        self._kind = device.type
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
        options = {"num_cpus": 1, "num_gpus": int(self._kind == "cuda"), "max_retries": _RETRIES}
        self._task: Any = ray.remote(**options)(_run_remotely)

    def solve(self, jobs: Iterable[SolveJob]) -> Iterator[dict[str, SolvedLayer]]:
        """Yield the finished layers of each job, in the order of the jobs.

        Raises:
            EngineError: a job's workers were lost again and again.
        """
        threads = torch.get_num_threads()
        waiting = [self._task.remote(_on_cpu(job), self._kind, threads) for job in jobs]
        for reference in waiting:
            try:
                yield self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except self._ray.exceptions.RayError as error:
                raise EngineError(
                    f"a Ray worker was lost {_RETRIES + 1} times in the same layer ({type(error).__name__}); what is "
                    "finished is kept, and the same command continues. Give workers more memory, or take "
                    "--set solvers=local."
                ) from None


def _on_cpu(job: SolveJob) -> SolveJob:
    cpu = torch.device("cpu")
    weights = {plan.name: job.weights[plan.name].to(cpu) for plan in job.plans}
    return dataclasses.replace(job, weights=weights, stats=job.stats.to(cpu))


def _run_remotely(job: SolveJob, kind: str, threads: int) -> dict[str, SolvedLayer]:
    """Run a job in a worker; what the next layers would meet, and the problem, stay there: nobody asks for them."""
    torch.set_num_threads(threads)
    solved = run_job(job, torch.device(kind))
    return {name: dataclasses.replace(layer, weight=torch.empty(0), problem=None) for name, layer in solved.items()}
