"""A vLLM engine in a process of its own, asked for log-probabilities and greedy continuations of token ids.

The engine may run in another environment than the caller: vLLM pins its libraries narrowly. That environment needs
this package too, for the plugin; `worker` is the engine's side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.quantization_description import CONFIG_NAME
from cloq_export.engines.held_adapters import HeldAdapter
from cloq_export.engines.vllm.listed_tokens import ListedTokens, ListsTokens
from cloq_export.engines.vllm.options import EngineSettings, engine_options, float_options
from cloq_export.engines.vllm.process import EngineProcess, engine_environment
from cloq_export.errors import EngineError, UsageError
from cloq_export.files.safe_json import read_json

_WORKER = "cloq_export.engines.vllm.worker"


@dataclasses.dataclass(frozen=True)
class EngineStart:
    """How the process of an engine is started.

    Args:
        python: the interpreter of the engine's environment; None is this one.
        kv_cache_gib: memory for keys and values on the CPU.
        threads: threads on the CPU; None leaves it to vLLM.
        plugin: False leaves this package's plugin out, to see what vLLM does by itself.
        timeout: seconds after which a start or an answer is given up.
    """

    python: str | os.PathLike[str] | None = None
    kv_cache_gib: int = 1
    threads: int | None = None
    plugin: bool = True
    timeout: float = 900


class VllmModel(ListsTokens):
    """An engine with one base and its adapters, loaded and ready.

    Args:
        export: an export, a checkpoint folder, or a run directory; with adapters also the folder of a float model.
        adapters: name -> adapter folder.
        settings: how they are served; None leaves all to `EngineSettings`.
        start: how the process is started; None leaves all to `EngineStart`.

    Raises:
        UsageError: an option is not allowed.
        BindingError: an adapter belongs to another base.
        FormatError: a file is damaged, or an adapter does not fit the base.
        EngineError: the engine did not start; its last lines are shown.
    """

    def __init__(
        self,
        export: Path,
        adapters: Mapping[str, Path],
        settings: EngineSettings | None = None,
        start: EngineStart | None = None,
    ) -> None:
        start = start or EngineStart()
        self.timeout, self._start = start.timeout, start
        self._lock = threading.Lock()
        # Files and options first: they cost nothing compared to a start.
        request = self._loading(export, adapters, settings or EngineSettings())
        variables = engine_environment(start.kv_cache_gib, threads=start.threads) | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        if not start.plugin:
            variables["VLLM_PLUGINS"] = "none-of-them"
        asked, asking = os.pipe()
        answering, answered = os.pipe()
        command = [str(start.python or sys.executable), "-m", _WORKER, str(asked), str(answered)]
        try:
            self._process = EngineProcess(command, variables, pass_fds=(asked, answered))
        except BaseException:
            os.close(asking)
            os.close(answering)
            raise
        finally:
            os.close(asked)
            os.close(answered)
        self._asking, self._answering = os.fdopen(asking, "w"), os.fdopen(answering)
        self._load(request)

    def load(self, export: Path, adapters: Mapping[str, Path], settings: EngineSettings | None = None) -> None:
        """Serve other files with the same process, in the place of those before; that spares the start.

        Args:
            export: as in the class.
            adapters: as in the class.
            settings: as in the class.

        Raises:
            CloqError: as the class.
        """
        self._load(self._loading(export, adapters, settings or EngineSettings()))

    def _load(self, request: Mapping[str, Any]) -> None:
        try:
            self._ask(request, "start")
        except BaseException:
            self.close()
            raise

    def _loading(self, export: Path, adapters: Mapping[str, Path], settings: EngineSettings) -> dict[str, Any]:
        """Return the request that makes the engine load these files, after checking them."""
        folders = {name: Path(folder) for name, folder in adapters.items()}
        options = {
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            **self._options(export, folders, settings),
        }
        if not self._start.plugin:
            options.pop("quantization", None)
        self.adapters = folders
        return {
            "options": options,
            "adapters": {name: [number, str(folders[name])] for number, name in enumerate(folders, 1)},
            "force": settings.force,
        }

    def _options(self, export: Path, folders: Mapping[str, Path], settings: EngineSettings) -> dict[str, Any]:
        config = Path(export) / CONFIG_NAME
        if folders and config.is_file() and "quantization_config" not in (content := read_json(config)):
            return float_options(str(export), content, folders, settings)
        return engine_options(Checkpoint.open(export), folders, settings, kv_cache_gib=self._start.kv_cache_gib)

    def prompt_logprobs(self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None]) -> list[torch.Tensor]:
        """Return log p(x_i | x_1..x_{i-1}), i = 2..n, of each sequence, all in one batch; see `ScoresPrompts`.

        Raises:
            UsageError: an adapter is not one of this model, or a sequence is empty.
            EngineError: the engine died or refused.
        """
        answer = self._ask({"prompt_logprobs": self._requests(token_ids, adapters)}, "answer")
        return [torch.tensor(values, dtype=torch.float32) for values in answer]

    def _listed(
        self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None], count: int
    ) -> list[list[ListedTokens]]:
        answer: list[list[ListedTokens]] = self._ask(
            {"prompt_logprobs": self._requests(token_ids, adapters), "listed": count}, "answer"
        )
        return answer

    def generate(
        self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None], max_new_tokens: int
    ) -> list[list[int]]:
        """Return greedy continuations, which end with the end-of-sequence token if it comes earlier.

        Args:
            token_ids: prompts.
            adapters: the adapter of each; None is the base alone.
            max_new_tokens: at most so many.

        Raises:
            UsageError: an adapter is not one of this model, or a prompt is empty.
            EngineError: the engine died or refused.
        """
        request = {"generate": self._requests(token_ids, adapters), "max_new_tokens": max_new_tokens}
        answer: list[list[int]] = self._ask(request, "answer")
        return answer

    def held_adapter(self, name: str) -> HeldAdapter | None:
        """Return which weights the engine holds of an adapter; None before its first request, or without the plugin.

        Args:
            name: one of this model's adapters.

        Raises:
            UsageError: it is not one of this model.
            EngineError: the engine died or refused.
        """
        check_requests([[0]], [name], self.adapters)
        held = self._ask({"held": name}, "answer")
        return None if held is None else HeldAdapter.from_json(held)

    def close(self) -> None:
        """End the engine; a second call does nothing."""
        for pipe in (self._asking, self._answering):
            with contextlib.suppress(OSError):
                pipe.close()
        self._process.stop()

    def __enter__(self) -> VllmModel:
        """Return the model."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the engine."""
        self.close()

    def _requests(self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None]) -> list[Any]:
        requests = check_requests(token_ids, adapters, self.adapters)
        return [[ids, name] for ids, name in requests]

    def _ask(self, request: Mapping[str, Any], what: str) -> Any:
        """Send one line, and return what the next line answers."""
        with self._lock, self._deadline() as late:
            try:
                self._asking.write(json.dumps(request) + "\n")
                self._asking.flush()
                line = self._answering.readline()
            except (OSError, ValueError):
                line = ""
        if not line:
            self._process.wait(10)
            if late.is_set():
                reason = f"gave no {what} within {self.timeout:g} seconds and was stopped"
            else:
                reason = f"ended without an {what}" if what == "answer" else "did not start"
            raise EngineError(f"the vLLM engine {reason} (exit code {self._process.exit_code}){self._process.told()}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(
                f"the vLLM engine refused: {answer['error']}; its last lines:\n{self._process.last_lines()}"
            )
        return answer["result"]

    @contextlib.contextmanager
    def _deadline(self) -> Iterator[threading.Event]:
        """Stop the engine if the block takes too long, which ends the wait for its line."""
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.stop(0)

        timer = threading.Timer(self.timeout, stop)
        timer.daemon = True
        timer.start()
        try:
            yield late
        finally:
            timer.cancel()


def check_requests(
    token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None], known: Mapping[str, Any]
) -> list[tuple[list[int], str | None]]:
    """Return every sequence with its adapter.

    Raises:
        UsageError: an adapter is not known, a sequence is empty, or there are more of one than of the other.
    """
    if len(token_ids) != len(adapters):
        raise UsageError(f"there are {len(token_ids)} sequences and {len(adapters)} adapters; give one for each.")
    for number, (ids, name) in enumerate(zip(token_ids, adapters, strict=True)):
        if not len(ids):
            raise UsageError(f"sequence {number} is empty; give at least one token.")
        if name is not None and name not in known:
            raise UsageError(f"there is no adapter {name!r}; there are {', '.join(known) or 'none'}.")
    return [([int(token) for token in ids], name) for ids, name in zip(token_ids, adapters, strict=True)]
