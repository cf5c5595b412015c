"""A client for vLLM's OpenAI-compatible server over a base of ours and its adapters."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import httpx2
import torch

from cloq_export.engines.held_adapters import HeldAdapter
from cloq_export.engines.vllm.access import Access
from cloq_export.engines.vllm.engine import check_requests
from cloq_export.engines.vllm.listed_tokens import ListedTokens, ListsTokens
from cloq_export.errors import EngineError, UsageError
from cloq_export.files.spelled_paths import expand_user


class ServerClient(ListsTokens):
    """A client for a server that `cloq serve` started, which can be used from several threads.

    Args:
        url: its address without a path.
        base_name: the name of the base without an adapter.
        adapters: names of the adapters that it serves.
        access: what it asks of its clients; None is nothing.
        timeout: seconds after which an answer is given up.
        clients: requests that are under way at a time.
    """

    def __init__(
        self,
        url: str,
        base_name: str,
        adapters: Iterable[str],
        *,
        access: Access | None = None,
        timeout: float = 900,
        clients: int = 8,
    ) -> None:
        access = access or Access()
        self.url, self.base_name = url, base_name
        self.timeout, self._clients = timeout, clients
        self._names = dict.fromkeys(adapters)
        self._http = httpx2.Client(
            base_url=url,
            headers=access.headers(),
            verify=access.trust(),
            # Proxies that the environment names are ignored, so that requests stay on this machine.
            trust_env=False,
            # A connection of its own for each: a server that restarts would leave kept ones half closed.
            limits=httpx2.Limits(max_keepalive_connections=0),
        )

    def is_ready(self) -> bool:
        """Return whether the server answers."""
        try:
            return self._http.get("/health", timeout=5).status_code == 200
        except httpx2.TransportError:
            return False

    def close(self) -> None:
        """Let go of what connects to the server; the server stays as it is."""
        self._http.close()

    def models(self) -> list[str]:
        """Return the names that requests can ask for, the default first."""
        return [card["id"] for card in self._get("/v1/models")["data"]]

    def places(self) -> dict[str, str]:
        """Return name -> folder of the model and of its adapters, as the server has it; "" where it does not say."""
        return {card["id"]: str(card.get("root") or "") for card in self._get("/v1/models")["data"]}

    def prompt_logprobs(self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None]) -> list[torch.Tensor]:
        """Return log p(x_i | x_1..x_{i-1}), i = 2..n, of each sequence, a request for each; see `ScoresPrompts`.

        Raises:
            UsageError: an adapter is not served, or a sequence is empty.
            EngineError: the server died or refused.
        """

        def score(ids: list[int], name: str | None) -> torch.Tensor:
            answer = self.complete(ids, name, max_tokens=1, prompt_logprobs=0)
            scores = answer["prompt_logprobs"][1:]
            values = [entry[str(token)]["logprob"] for token, entry in zip(ids[1:], scores, strict=True)]
            return torch.tensor(values, dtype=torch.float32)

        return self._each(score, token_ids, adapters)

    def _listed(
        self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None], count: int
    ) -> list[list[ListedTokens]]:
        def list_places(ids: list[int], name: str | None) -> list[ListedTokens]:
            answer = self.complete(ids, name, max_tokens=1, prompt_logprobs=count)
            return [
                [(int(token), float(entry["logprob"])) for token, entry in place.items()]
                for place in answer["prompt_logprobs"][1:]
            ]

        return self._each(list_places, token_ids, adapters)

    def generate(
        self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None], max_new_tokens: int
    ) -> list[list[int]]:
        """Return greedy continuations, which end with the end-of-sequence token if it comes earlier.

        Args:
            token_ids: prompts.
            adapters: the adapter of each; None is the base alone.
            max_new_tokens: at most so many.

        Raises:
            UsageError: an adapter is not served, or a prompt is empty.
            EngineError: the server died or refused.
        """

        def continue_greedily(ids: list[int], name: str | None) -> list[int]:
            answer = self.complete(ids, name, max_tokens=max_new_tokens, return_token_ids=True)
            return list(answer["token_ids"])

        return self._each(continue_greedily, token_ids, adapters)

    def complete(self, prompt: str | list[int], adapter: str | None, **options: Any) -> dict[str, Any]:
        """Return the only choice of one greedy completion.

        Args:
            prompt: text or token ids.
            adapter: its name; None is the base alone.
            options: of `/v1/completions`.

        Raises:
            EngineError: the server died or refused.
        """
        model = self.base_name if adapter is None else adapter
        answer = self._post("/v1/completions", {"model": model, "prompt": prompt, "temperature": 0.0, **options})
        choice: dict[str, Any] = answer["choices"][0]
        return choice

    def load_adapter(self, name: str, folder: str | os.PathLike[str], *, replace: bool = False) -> None:
        """Load an adapter while the server runs; the server checks it as `cloq serve` does.

        Args:
            name: what requests ask for.
            folder: the adapter.
            replace: take the place of an adapter of this name; requests under way are finished with the weights before.

        Raises:
            EngineError: the server refused, and says why.
        """
        place = str(expand_user(folder).resolve())
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": place, "load_inplace": replace})
        self._names[name] = None

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter while the server runs.

        Raises:
            EngineError: the server refused, and says why.
        """
        self._post("/v1/unload_lora_adapter", {"lora_name": name})
        self._names.pop(name, None)

    def held_adapter(self, name: str) -> HeldAdapter | None:
        """Return which weights the server holds of an adapter; None before its first use, or without the plugin.

        Args:
            name: of an adapter that it serves.

        Raises:
            UsageError: the server does not know the adapter.
            EngineError: the server died or refused.
        """
        try:
            known = self._get("/v1/held_lora_adapters")["adapters"]
        except EngineError as error:
            if "(404)" in str(error):
                return None  # a server without the plugin
            raise
        if name not in known:
            raise UsageError(f"the server has no adapter {name!r:.80}; it has {', '.join(known) or 'none'}.")
        return None if known[name] is None else HeldAdapter.from_json(known[name])

    def _each(self, ask: Any, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None]) -> list[Any]:
        requests = check_requests(token_ids, adapters, self._names)
        with concurrent.futures.ThreadPoolExecutor(self._clients) as pool:
            return list(pool.map(lambda request: ask(*request), requests))

    def _get(self, path: str) -> dict[str, Any]:
        return self._send("GET", path)

    def _post(self, path: str, content: Mapping[str, Any]) -> dict[str, Any]:
        return self._send("POST", path, json=content)

    def _send(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        try:
            answer = self._http.request(method, path, timeout=self.timeout, **content)
        except httpx2.TransportError as error:
            raise EngineError(f"the server did not answer ({error}){self._state()}") from None
        if answer.is_error:
            raise EngineError(f"the server refused ({answer.status_code}): {_refusal(answer)}")
        try:
            parsed: dict[str, Any] = answer.json()
        except ValueError:
            return {}  # loading and unloading answer with a sentence
        return parsed

    def _state(self) -> str:
        """Return what is known of a server that does not answer, to be put behind a message."""
        return "; see whether it still runs."


def _refusal(answer: httpx2.Response) -> str:
    """Return what a refusal says."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:300]
