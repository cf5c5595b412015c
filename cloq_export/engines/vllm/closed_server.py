"""A server that has loaded everything and answers nobody yet but the program that started it."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from cloq_export.engines.held_adapters import HeldAdapter
from cloq_export.engines.vllm.engine import check_requests
from cloq_export.errors import EngineError

_PAUSE = 0.2


class ClosedServer:
    """What a server computes while its port is closed.

    Args:
        connection: this program's end of the socket that the server inherited.
        adapters: names of the adapters that it serves.
        waiting: called again and again while an answer is awaited; raises where none will come.
    """

    def __init__(self, connection: socket.socket, adapters: Iterable[str], waiting: Callable[[], None]) -> None:
        self._connection, self._waiting = connection, waiting
        self._names = dict.fromkeys(adapters)
        self._received = b""
        connection.settimeout(_PAUSE)

    def await_loaded(self) -> None:
        """Wait until the server has loaded the base and its adapters."""
        self._line()

    def open(self) -> None:
        """Let the server open its port."""
        self._ask({"open": True})

    def prompt_logprobs(self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None]) -> list[torch.Tensor]:
        """Return log p(x_i | x_1..x_{i-1}), i = 2..n, of each sequence, one after the other; see `ScoresPrompts`.

        Raises:
            UsageError: an adapter is not served, or a sequence is empty.
            EngineError: the server died or refused.
        """
        requests = check_requests(token_ids, adapters, self._names)
        answer = self._ask({"prompt_logprobs": requests})
        return [torch.tensor(values, dtype=torch.float32) for values in answer]

    def held_adapter(self, name: str) -> HeldAdapter | None:
        """Return which weights the server holds of an adapter; None before its first request.

        Args:
            name: of an adapter that it serves.

        Raises:
            UsageError: it is not served.
            EngineError: the server died or refused.
        """
        check_requests([[0]], [name], self._names)
        held = self._ask({"held": name})
        return None if held is None else HeldAdapter.from_json(held)

    def close(self) -> None:
        """Let go of the socket; a second call does nothing."""
        self._connection.close()

    def _ask(self, request: Mapping[str, Any]) -> Any:
        with contextlib.suppress(OSError):  # a server that is gone gives no answer, which is told below
            self._connection.sendall(json.dumps(request).encode() + b"\n")
        answer = json.loads(self._line())
        if "error" in answer:
            raise EngineError(f"the vLLM server refused: {answer['error']}")
        return answer["result"]

    def _line(self) -> bytes:
        while b"\n" not in self._received:
            self._waiting()
            try:
                received = self._connection.recv(1 << 16)
            except TimeoutError:
                continue
            except OSError:
                received = b""
            if not received:
                time.sleep(_PAUSE)  # the server is about to end, and then says why
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        return line
