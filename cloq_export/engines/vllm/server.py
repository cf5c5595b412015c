"""vLLM's OpenAI-compatible server over a base of ours and its adapters, as a program of this one."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from cloq_export.engines.vllm.client import ServerClient
from cloq_export.engines.vllm.plan import ServerOptions, ServerPlan, plan_server
from cloq_export.engines.vllm.plugin.adapters import LIFELINE_VARIABLE
from cloq_export.engines.vllm.process import EngineProcess
from cloq_export.errors import EngineError


class VllmServer(ServerClient):
    """A server of this program, and a client for it that can be used from several threads.

    Args:
        plan: from `plan_server`.
        timeout: seconds after which a start or an answer is given up.
        clients: requests that are under way at a time.
        echo: where the server's lines go once it is ready; None keeps them silent.
        early_echo: where they go before.
        waiting: called again and again until the server is ready.

    Raises:
        EngineError: the server did not start; its last lines are shown.
    """

    def __init__(
        self,
        plan: ServerPlan,
        *,
        timeout: float = 900,
        clients: int = 8,
        echo: IO[str] | None = None,
        early_echo: IO[str] | None = None,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(plan.url, plan.base_name, plan.adapters, timeout=timeout, clients=clients)
        self.plan = plan
        # Its other end closes with this program, even if that is killed; then the server ends too.
        held, self._lifeline = os.pipe()
        try:
            environment = {**plan.environment, LIFELINE_VARIABLE: str(held)}
            self._process = EngineProcess(plan.command, environment, pass_fds=(held,), echo=early_echo)
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(held)
        try:
            self._wait_until_ready(waiting)
        except BaseException:
            self.close()
            raise
        self._process.echo = echo

    @classmethod
    def start(
        cls,
        export: Path,
        adapters: Mapping[str, Path],
        options: ServerOptions | None = None,
        *,
        timeout: float = 900,
    ) -> VllmServer:
        """Start a server on a free port of this machine, with the first adapter as the default unless another is named.

        Args:
            export: an export, a checkpoint folder, or a run directory.
            adapters: name -> adapter folder.
            options: of the server, whose port is not looked at; None leaves all to `ServerOptions`.
            timeout: as for the class.

        Returns:
            VllmServer: ready.

        Raises:
            CloqError: as `plan_server` and the class.
        """
        options = options or ServerOptions()
        default = options.default or next(iter(adapters), None)
        options = dataclasses.replace(options, port=0, default=default)
        return cls(plan_server(export, adapters, options), timeout=timeout)

    def _wait_until_ready(self, waiting: Callable[[], None]) -> None:
        end = time.monotonic() + self.timeout
        while True:
            if self._process.exit_code is not None:
                raise EngineError(
                    f"the vLLM server did not start (exit code {self._process.exit_code}); its last lines:\n"
                    f"{self._process.last_lines()}"
                )
            if self.is_ready():
                return
            if time.monotonic() > end:
                raise EngineError(
                    f"the vLLM server was not ready within {self.timeout:g} seconds and was stopped; its last lines:\n"
                    f"{self._process.last_lines()}"
                )
            waiting()
            time.sleep(0.5)

    def wait(self, seconds: float | None = None) -> int | None:
        """Wait for the end of the server, and return how it ended, or None after so many seconds."""
        return self._process.wait(seconds)

    def last_lines(self) -> str:
        """Return the last lines that the server wrote."""
        return self._process.last_lines()

    def close(self) -> None:
        """Stop the server; a second call does nothing."""
        super().close()
        self._process.stop()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def __enter__(self) -> VllmServer:
        """Return the server."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the server."""
        self.close()

    def _state(self) -> str:
        state = "runs" if self._process.exit_code is None else f"ended with exit code {self._process.exit_code}"
        return f" and {state}; its last lines:\n{self._process.last_lines()}"
