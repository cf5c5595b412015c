"""Solve requests on a Ray cluster of two workers, kill the first of them, and compare with a local run."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import ray
import torch

from cloq_export.compress import workers

specification = importlib.util.spec_from_file_location("test_workers", sys.argv[1])
tests = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tests)
killed = sys.argv[2]
run = workers._solve_remotely


def dies_once(request, kind, threads):
    try:
        os.close(os.open(killed, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return run(request, kind, threads)
    os.kill(os.getpid(), signal.SIGKILL)
    return None


torch.set_num_threads(1)
workers._solve_remotely = dies_once
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
requests = [tests.make_request(number) for number in range(4)]
local = list(workers.LocalWorkers([tests.CPU]).solve(requests))
remote = list(workers.RayWorkers(tests.CPU).solve(requests))
for one, other in zip(local, remote, strict=True):
    tests.assert_same(one, other)
print(json.dumps({"requests": len(remote), "same": True, "workers_killed": int(Path(killed).exists())}))
ray.shutdown()
