"""Solve jobs on a Ray cluster of two workers of this machine, kill the first of them, and compare with a local run."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import ray
import torch

from cloq_export.compress import solvers

specification = importlib.util.spec_from_file_location("test_solvers", sys.argv[1])
tests = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tests)
killed = sys.argv[2]
run = solvers._run_remotely


def dies_once(job, kind, threads):
    try:
        os.close(os.open(killed, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return run(job, kind, threads)
    os.kill(os.getpid(), signal.SIGKILL)
    return None


torch.set_num_threads(1)
solvers._run_remotely = dies_once
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
jobs = [tests.make_job(number) for number in range(4)]
local = list(solvers.LocalSolvers([tests.CPU]).solve(jobs))
remote = list(solvers.RaySolvers(tests.CPU).solve(jobs))
for one, other in zip(local, remote, strict=True):
    tests.assert_same(one, other)
print(json.dumps({"jobs": len(remote), "same": True, "workers_killed": int(Path(killed).exists())}))
ray.shutdown()
