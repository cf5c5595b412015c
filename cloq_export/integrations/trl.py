"""Rollouts for TRL's GRPO from a vLLM server that is sent the adapter alone: A and B, never the base.

TRL's own synchronisation merges the adapter into the base, which a packed base cannot hold, and sends all weights. Here
the adapter of each step is loaded under a name of its own, and the one before is unloaded when its last request is
done.
Nothing of TRL is imported: `AdapterRollouts` is what its `GRPOTrainer` takes as `rollout_func`.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import shutil
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cloq_export.artifact.run_lock import RunLock
from cloq_export.engines.vllm.client import ServerClient
from cloq_export.errors import EngineError, RunDirectoryError, UsageError

Result = TypeVar("Result")
# Seconds between two looks at a server that is gone.
_PAUSE = 2.0


class Canary(Protocol):
    """What looks at each sync, such as `parity.canary.SyncCanary`."""

    def check(self, step: int, adapter: str) -> object:
        """Compare trainer and engine; raises where they differ."""


@dataclasses.dataclass(frozen=True)
class RolloutOptions:
    """How rollouts are made.

    Args:
        name: adapters are served as `NAME-STEP`; every trainer at one server needs a name of its own.
        patience: seconds for which a server that is gone is waited for.
        requests: that are under way at a time.
        seed: of the sampling.
    """

    name: str = "policy"
    patience: float = 600
    requests: int = 8
    seed: int = 0


class AdapterRollouts:
    """A `rollout_func` for TRL's `GRPOTrainer` (1.16): loads the adapter of each step into a server, and samples there.

    Length, temperature, top-p and top-k are those of the trainer's own arguments. Log-probabilities are the server's,
    of the distribution before temperature. A server that is gone is waited for, the adapter is loaded into it again,
    and the rollouts are asked once more; the folder of the last adapter that was served stays. What a training that was
    killed left at the server, from the same folder, makes room.

    Args:
        server: a client of `cloq serve`, or of `vllm serve` with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`.
        folder: where the adapter of each step is written; the server reads it there.
        options: how.
        canary: asked after each sync; what it raises ends the training.

    Raises:
        UsageError: another trainer serves an adapter under the name of a step, or writes into the folder.
        EngineError: the server refuses an adapter, or does not come back.
    """

    def __init__(
        self,
        server: ServerClient,
        folder: Path,
        options: RolloutOptions | None = None,
        canary: Canary | None = None,
    ) -> None:
        self.server, self.folder = server, Path(folder)
        self.options, self.canary = options or RolloutOptions(), canary
        self._lock = RunLock(self.folder)
        weakref.finalize(self, self._lock.give_back)
        self._step: int | None = None
        self._asked = 0

    @property
    def served_as(self) -> str | None:
        """Return the name of the adapter that is served; None before the first rollout."""
        return None if self._step is None else self._name(self._step)

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, list[Any]]:
        """Return one completion for each prompt, by the weights that the trainer has now.

        Args:
            prompts: texts, or conversations as lists of messages.
            trainer: TRL's.

        Returns:
            dict: "prompt_ids", "completion_ids" and "logprobs", one list for each prompt.
        """
        step = int(trainer.state.global_step)
        if step != self._step:
            self._sync(trainer, step)
        prompt_ids = [_prompt_ids(prompt, trainer.processing_class) for prompt in prompts]
        sampling = _sampling(trainer.args)

        def sample(number: int) -> tuple[list[int], list[float]]:
            seeded = {**sampling, "seed": self.options.seed + first + number}
            answer = self.server.complete(prompt_ids[number], self._name(step), **seeded)
            ids, logprobs = list(answer["token_ids"]), list(answer["logprobs"]["token_logprobs"])
            if len(ids) != len(logprobs):
                raise EngineError(f"the server gave {len(logprobs)} log-probabilities for {len(ids)} tokens.")
            return ids, logprobs

        def all_of_them() -> list[tuple[list[int], list[float]]]:
            with concurrent.futures.ThreadPoolExecutor(self.options.requests) as pool:
                return list(pool.map(sample, range(len(prompt_ids))))

        first, self._asked = self._asked, self._asked + len(prompt_ids)
        answers = self._patiently(all_of_them)
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [ids for ids, _ in answers],
            "logprobs": [logprobs for _, logprobs in answers],
        }

    def _sync(self, trainer: Any, step: int) -> None:
        """Write the adapter, load it, look at it, and let go of the one before."""
        name, before = self._name(step), self._step
        if trainer.accelerator.is_main_process:
            self._take_folder()
            self._make_room(name)
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(self.folder / name)
            self._load(name)
        trainer.accelerator.wait_for_everyone()
        self._step = step
        if self.canary is not None:
            self.canary.check(step, name)
        if before is not None and trainer.accelerator.is_main_process:
            # All of its requests are done: a rollout ends with its last one.
            self._patiently(lambda: self._let_go(self._name(before)), loads=False)
            shutil.rmtree(self.folder / self._name(before), ignore_errors=True)

    def _take_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.take()
        except RunDirectoryError:
            raise UsageError(
                f"another trainer writes its adapters into {self.folder}; give each a folder and a `name` of its own."
            ) from None

    def _make_room(self, name: str) -> None:
        """Take away what an earlier process of this training has left at the server under this name.

        Raises:
            UsageError: it is another trainer's.
        """
        found = self._patiently(self.server.places, loads=False).get(name)
        if found is None:
            return
        if found != str(self.folder.resolve() / name):
            raise UsageError(
                f"the server already serves {name}, perhaps for another trainer; unload it, or choose another `name`."
            )
        self.server.unload_adapter(name)

    def _load(self, name: str) -> None:
        """Load an adapter; where the server has no room for two, the one before gives up its place.

        Raises:
            EngineError: the server refuses it; the message names the folder of the last adapter that was served.
        """
        try:
            self._patiently(lambda: self.server.load_adapter(name, self.folder / name), loads=False)
        except EngineError as error:
            last = self.served_as
            if last is None:
                raise EngineError(f"{name} was not loaded: {error}") from None
            self._let_go(last)
            try:
                self.server.load_adapter(name, self.folder / name)
            except EngineError:
                raise EngineError(
                    f"{name} was not loaded: {str(error).rstrip('.')}; the last adapter that was served is in "
                    f"{self.folder / last}."
                ) from None

    def _let_go(self, name: str) -> None:
        if name in self.server.models():  # a server that was started again has forgotten it
            self.server.unload_adapter(name)

    def _patiently(self, ask: Callable[[], Result], *, loads: bool = True) -> Result:
        """Ask a server; if it is gone meanwhile, wait for it, load the adapter into it again, and ask once more."""
        try:
            return ask()
        except EngineError as error:
            if self.server.is_ready() and not (loads and self._is_gone()):
                raise  # the server is there and refuses
            end = time.monotonic() + self.options.patience
            while not self.server.is_ready():
                if time.monotonic() > end:
                    last = self.served_as
                    kept = "" if last is None else f"; the last adapter is in {self.folder / last}"
                    raise EngineError(
                        f"the server at {self.server.url} did not come back within {self.options.patience:g} seconds "
                        f"({error}){kept}."
                    ) from None
                time.sleep(_PAUSE)
            if loads and self._is_gone() and self._step is not None:
                name = self._name(self._step)
                self.server.load_adapter(name, self.folder / name)
            return ask()

    def _is_gone(self) -> bool:
        return self._step is not None and self._name(self._step) not in self.server.models()

    def _name(self, step: int) -> str:
        return f"{self.options.name}-{step}"


def _prompt_ids(prompt: Any, tokenizer: Any) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(text=prompt)["input_ids"])
    found = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(found["input_ids"])


def _sampling(args: Any) -> dict[str, Any]:
    """Return the options of `/v1/completions` that a trainer's arguments mean."""
    options: dict[str, Any] = {
        "max_tokens": args.max_completion_length,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "logprobs": 0,
        "return_token_ids": True,
    }
    return options | ({"top_k": args.top_k} if args.top_k else {})
