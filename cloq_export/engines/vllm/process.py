"""Programs that compute with vLLM: how they are started, read, and stopped with all of their children."""

from __future__ import annotations

import collections
import contextlib
import getpass
import os
import re
import signal
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import IO

from cloq_export.errors import EngineError

_TAIL_LINES = 40
# The last line of a traceback whose error is one of this package: in the log of any process of vLLM.
_REFUSAL = re.compile(r"\bcloq_export\.errors\.\w+: (.+)")
# Keeps the working folder out of the modules that an interpreter finds: a folder there may have a library's name.
SAFE_PATH = {"PYTHONSAFEPATH": "1"}


class EngineProcess:
    """A program whose output is read all the time and whose last lines are kept, stopped with all of its children.

    Its folder for temporary files is its own and goes with it: vLLM leaves sockets and files of its start there.

    Args:
        command: the program and its arguments.
        environment: variables to add to this process's own.
        pass_fds: file descriptors that it inherits.
        echo: where its lines go too; None keeps them silent.

    Raises:
        EngineError: the program cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        pass_fds: Sequence[int] = (),
        echo: IO[str] | None = None,
    ) -> None:
        self.echo = echo
        self._refusal: str | None = None
        self._lines: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        # A short name: a socket's path has a hundred characters at most.
        place = tempfile.TemporaryDirectory(prefix="cloq-", ignore_cleanup_errors=True)
        try:
            self._process = subprocess.Popen(
                list(command),
                env=_shared_caches() | os.environ | SAFE_PATH | {"TMPDIR": place.name} | dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                pass_fds=pass_fds,
                # A group of its own: Ctrl-C goes to this program, which then stops the engine in order.
                start_new_session=True,
            )
        except OSError as error:
            place.cleanup()
            raise EngineError(f"{command[0]} cannot be started: {error.strerror or error}; check `python`.") from error
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._stop_at_exit = weakref.finalize(self, _end, self._process, place)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line.rstrip("\n"))
            refused = _REFUSAL.search(line)
            if refused and self._refusal is None:
                self._refusal = refused[1].strip()
            if self.echo is not None:
                with contextlib.suppress(OSError, ValueError):
                    self.echo.write(line)
                    self.echo.flush()

    @property
    def exit_code(self) -> int | None:
        """Return how the program ended, or None while it runs."""
        return self._process.poll()

    def last_lines(self, count: int = 15) -> str:
        """Return the last lines that the program wrote."""
        if self.exit_code is not None:
            self._reader.join(timeout=5)
        kept = [line for line in self._lines if line.strip()][-count:]
        return "\n".join(kept) or "(it wrote nothing)"

    def told(self) -> str:
        """Return why the program ended, to be put behind a message: what this package refused, or its last lines."""
        lines = self.last_lines()
        return f"; its last lines:\n{lines}" if self._refusal is None else f": {self._refusal}"

    def wait(self, seconds: float | None = None) -> int | None:
        """Wait for the end of the program, and return how it ended, or None after so many seconds."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def stop(self, seconds: float = 15) -> None:
        """Ask the program to end, and after so many seconds end it and its children."""
        if self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            try:
                self.wait(seconds)
            except BaseException:  # a second Ctrl-C: no more patience
                self._stop_at_exit()
                raise
        self._stop_at_exit()
        self._reader.join(timeout=5)
        if self._process.stdout is not None and not self._reader.is_alive():
            self._process.stdout.close()


def _end(process: subprocess.Popen[str], place: tempfile.TemporaryDirectory[str]) -> None:
    """End a program and all processes in its group, and remove what they leave."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    place.cleanup()


def _shared_caches() -> dict[str, str]:
    """Return where programs keep what they compile, which torch puts among temporary files: the next one needs it."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user that has a number alone
        user = str(os.getuid())
    return {"TORCHINDUCTOR_CACHE_DIR": os.path.join(tempfile.gettempdir(), f"torchinductor_{user}")}


def engine_environment(kv_cache_gib: int, *, threads: int | None = None) -> dict[str, str]:
    """Return the environment variables that every engine of ours gets.

    Args:
        kv_cache_gib: memory for keys and values on the CPU.
        threads: threads of one engine on the CPU; None leaves it to vLLM.
    """
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        # vLLM's 4-bit CPU kernel would round activations to 8 bits.
        "VLLM_CPU_INT4_W4A8": "0",
        "PYTHONUNBUFFERED": "1",
    }
    if threads is not None:
        variables |= {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return variables
