"""Take many families through everything, each in a process of its own, and keep one JSON line for each.

`python tests/models/families/run_families.py --results build/families.jsonl` goes on where it stopped; families named
behind it are done anew. `--page docs/models.md` renders the results.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import configurations
import transformers
from check_family import FamilyResult, check_family
from model_page import render_page

_SECONDS = 240


def run_families(families: Sequence[str], *, processes: int = 1) -> Iterator[FamilyResult]:
    """Yield the result of each family as it comes.

    Args:
        families: model types.
        processes: that work side by side.
    """
    context = multiprocessing.get_context("forkserver")
    # Torch and transformers are read once, and what each family leaves behind ends with its process.
    context.set_forkserver_preload(["check_family", "cloq_export.verbs", "peft"])
    waiting = list(reversed(families))
    going: list[tuple[str, multiprocessing.process.BaseProcess, multiprocessing.connection.Connection, Any]] = []
    while waiting or going:
        while waiting and len(going) < processes:
            family = waiting.pop()
            receiving, sending = context.Pipe(duplex=False)
            # Removed here: the process is ended as soon as it has answered.
            folder = tempfile.TemporaryDirectory()
            process = context.Process(target=_check, args=(family, sending, folder.name))
            process.start()
            sending.close()
            going.append((family, process, receiving, folder))
        family, process, receiving, folder = going.pop(0)
        with folder:
            result = _result_of(family, process, receiving)
        yield result


def _check(family: str, sending: multiprocessing.connection.Connection, folder: str) -> None:
    import warnings

    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    sending.send(check_family(family, Path(folder)).to_json())


def _result_of(
    family: str, process: multiprocessing.process.BaseProcess, receiving: multiprocessing.connection.Connection
) -> FamilyResult:
    try:
        if receiving.poll(_SECONDS):
            return FamilyResult.of_json(receiving.recv())
        reason = f"not done after {_SECONDS} seconds"
    except EOFError:
        process.join()
        reason = f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return FamilyResult(family, configurations.architecture_of(family), "crashed", "", reason)


def read_results(path: Path) -> dict[str, FamilyResult]:
    """Return the results of a file, the last of each family."""
    lines = path.read_text().splitlines() if path.is_file() else []
    results = (FamilyResult.of_json(line) for line in lines)
    return {result.family: result for result in results}


def version_in(page: str) -> str:
    """Return the version of transformers that a page names."""
    return page.partition("family in transformers ")[2].partition(",")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="model types to do anew; unless given, all that have no result")
    parser.add_argument("--results", type=Path, required=True, help="file of one JSON line for each family")
    parser.add_argument("--again", action="append", default=[], help="outcome that is done anew, e.g. crashed")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--page", type=Path, help="render what is in the file of results into this page, and end")
    options = parser.parse_args()
    results = read_results(options.results)
    if options.page:
        options.page.write_text(render_page(results, version=transformers.__version__), encoding="utf-8")
        return
    every = [*configurations.causal_families(), *configurations.wrapper_families()]
    wanted = options.families or [
        family for family in every if family not in results or results[family].outcome in options.again
    ]
    os.environ["OMP_NUM_THREADS"] = "1"
    with open(options.results, "a", encoding="utf-8") as file:
        for result in run_families(wanted, processes=options.processes):
            print(f"{result.family}: {result.outcome} {result.step} {result.reason[:160]}", flush=True)
            file.write(result.to_json() + "\n")
            file.flush()


if __name__ == "__main__":
    main()
