"""vLLM's OpenAI-compatible server over a base of ours and its adapters, as a program of this one."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from cloq_export.engines.vllm.client import ServerClient
from cloq_export.engines.vllm.closed_server import ClosedServer
from cloq_export.engines.vllm.plan import ServerOptions, ServerPlan, plan_server
from cloq_export.engines.vllm.plugin.adapters import DOOR_VARIABLE, LIFELINE_VARIABLE
from cloq_export.engines.vllm.process import EngineProcess
from cloq_export.errors import EngineError


@dataclasses.dataclass(frozen=True)
class Watch:
    """What is seen of a server while it starts and afterwards.

    Args:
        echo: where its lines go once it is ready; None keeps them silent.
        early_echo: where they go before.
        waiting: called again and again until it is ready.
    """

    echo: IO[str] | None = None
    early_echo: IO[str] | None = None
    waiting: Callable[[], None] = lambda: None


class VllmServer(ServerClient):
    """A server of this program, and a client for it that can be used from several threads.

    Args:
        plan: from `plan_server`.
        timeout: seconds after which a start or an answer is given up.
        clients: requests that are under way at a time.
        watch: what is seen of it; None is nothing.
        prove: is given the server when it has loaded everything and its port is still closed; what it raises ends the
            server.

    Raises:
        EngineError: the server did not start; its last lines are shown.
    """

    def __init__(
        self,
        plan: ServerPlan,
        *,
        timeout: float = 900,
        clients: int = 8,
        watch: Watch | None = None,
        prove: Callable[[ClosedServer], None] | None = None,
    ) -> None:
        super().__init__(plan.url, plan.base_name, plan.adapters, access=plan.access, timeout=timeout, clients=clients)
        self.plan, watch = plan, watch or Watch()
        # Its other end closes with this program, even if that is killed; then the server ends too.
        held, self._lifeline = os.pipe()
        mine, inherited = socket.socketpair()
        try:
            environment = {
                **plan.environment,
                LIFELINE_VARIABLE: str(held),
                DOOR_VARIABLE: str(inherited.fileno()),
            }
            descriptors = (held, inherited.fileno())
            self._process = EngineProcess(plan.command, environment, pass_fds=descriptors, echo=watch.early_echo)
        except BaseException:
            os.close(self._lifeline)
            mine.close()
            raise
        finally:
            os.close(held)
            inherited.close()
        try:
            with mine:
                self._start(mine, watch.waiting, prove)
        except BaseException:
            self.close()
            raise
        self._process.echo = watch.echo

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

    def _start(
        self, door: socket.socket, waiting: Callable[[], None], prove: Callable[[ClosedServer], None] | None
    ) -> None:
        end = time.monotonic() + self.timeout

        def wait() -> None:
            self._refuse_lost(end)
            waiting()

        closed = ClosedServer(door, self.plan.adapters, wait)
        closed.await_loaded()
        if prove is not None:
            prove(closed)
        closed.open()
        while not self._listens():
            wait()
            time.sleep(0.1)

    def _refuse_lost(self, end: float) -> None:
        """Refuse to wait for a server that has ended, or beyond a time.

        Raises:
            EngineError: it will not start.
        """
        if self._process.exit_code is not None:
            raise EngineError(
                f"the vLLM server did not start (exit code {self._process.exit_code}){self._process.told()}"
            )
        if time.monotonic() > end:
            raise EngineError(
                f"the vLLM server was not ready within {self.timeout:g} seconds and was stopped; its last lines:\n"
                f"{self._process.last_lines()}"
            )

    def _listens(self) -> bool:
        # vLLM has bound the port since before it loaded anything, so nobody else answers there.
        try:
            with socket.create_connection((self.plan.reachable_host, self.plan.port), timeout=5):
                return True
        except OSError:
            return False

    def wait(self, seconds: float | None = None) -> int | None:
        """Wait for the end of the server, and return how it ended, or None after so many seconds."""
        return self._process.wait(seconds)

    def last_lines(self) -> str:
        """Return the last lines that the server wrote."""
        return self._process.last_lines()

    def close(self) -> None:
        """Stop the server; a second call does nothing."""
        super().close()
        # After the time for requests under way the engine takes some more to end.
        self._process.stop(self.plan.shutdown_timeout + 15)
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
