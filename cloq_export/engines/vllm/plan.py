"""A vLLM server before it is started: options, checks, and the command line."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.needed_adapter import refuse_alone
from cloq_export.engines.vllm.access import API_KEY_VARIABLE, Access, Certificates, read_api_key
from cloq_export.engines.vllm.facts import engine_facts
from cloq_export.engines.vllm.options import EngineSettings, engine_options
from cloq_export.engines.vllm.plugin.adapters import POLICY_VARIABLE, ServingPolicy, check_name, derived_name
from cloq_export.engines.vllm.plugin.deterministic import DETERMINISTIC_VARIABLE
from cloq_export.engines.vllm.process import engine_environment
from cloq_export.errors import UsageError
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
    "--ssl-certfile": "--ssl-certfile",
    "--ssl-keyfile": "--ssl-keyfile",
    "--ssl-ca-certs": "--ssl-ca-certs",
    "--ssl-cert-reqs": "--ssl-ca-certs",
    "--shutdown-timeout": "--shutdown-timeout",
    "--uds": "--host and --port",
}
# Keys and values are then read in one piece, whoever else is in the batch.
DETERMINISTIC_ENVIRONMENT = {DETERMINISTIC_VARIABLE: "1", "VLLM_CPU_ATTN_SPLIT_KV": "0"}
_TRUST, _KEY = "--trust-remote-code", "--api-key"
_GIB = 1 << 30
_LARGEST_KV_GIB = 32


def choose_kv_cache_gib(checkpoint: Checkpoint) -> int:
    """Return a share of the free memory for keys and values: a quarter of what the model itself leaves free."""
    free = psutil.virtual_memory().available
    weights = sum(header_bytes(header) for header in checkpoint.headers.values())
    return max(1, min(_LARGEST_KV_GIB, (free - 2 * weights) // (4 * _GIB)))


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
        needs_adapter: the base says nothing without its adapter: requests for `base_name` are refused.
        access: what it asks of its clients.
        certificates: that it encrypts with; None is plain HTTP.
        shutdown_timeout: seconds in which requests under way may end when it is stopped.
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
    needs_adapter: bool = False
    access: Access = dataclasses.field(default_factory=Access)
    certificates: Certificates | None = None
    shutdown_timeout: int = 0

    @property
    def reachable_host(self) -> str:
        """Return where this machine reaches the server."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)

    @property
    def lets_strangers_in(self) -> bool:
        """Return whether other machines may reach the server and it asks nobody for a key or a certificate."""
        try:
            local = self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            local = False  # a name of this machine
        asks = self.access.api_key is not None or (self.certificates is not None and self.certificates.ca_certs)
        return not local and not asks

    @property
    def url(self) -> str:
        """Return the address without a path."""
        host = f"[{self.reachable_host}]" if ":" in self.reachable_host else self.reachable_host
        return f"http{'s' if self.certificates else ''}://{host}:{self.port}"

    @property
    def served_names(self) -> list[str]:
        """Return every name that is answered to, the default first and the base last."""
        others = [name for name in (*self.adapters, self.base_name) if name != self.name]
        return [self.name, *(name for name in others if not (self.needs_adapter and name == self.base_name))]


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """What a server is asked to be.

    Args:
        default: the adapter that plain requests get; None takes the only one.
        name: the model's own name; None takes the folder's.
        host: address to listen at.
        port: 0 takes a free one.
        dtype: of the activations; None takes float32 on the CPU and float16 on CUDA.
        python: interpreter of the engine's environment; None is this one.
        max_model_len: longest prompt with its answer; None takes the model's own, or what the memory holds.
        max_lora_rank: rank that adapters may have; None takes what the served ones need.
        max_loras: adapters in one batch; None takes all of these, at most 8.
        kv_cache_gib: memory for keys and values on the CPU; None takes a share of what is free.
        threads: threads on the CPU; None leaves it to vLLM.
        force: take adapters of another base.
        trust_adapters: take adapters that are bound to no base.
        deterministic: packed layers and their adapters give a token the same bits in every batch, on the CPU.
        adapter_roots: folders from which adapters may be loaded while it serves, beside those of the start.
        api_key_file: holds the key that requests must carry; None takes that of the environment, if there is one.
        ssl_certfile: certificate of the server, PEM; None is plain HTTP.
        ssl_keyfile: its key.
        ssl_ca_certs: certificates of which one must have signed that of each client.
        shutdown_timeout: seconds in which requests under way may end when it is stopped.
        engine_options: more options of vLLM's server, as typed.
    """

    default: str | None = None
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str | None = None
    python: str | os.PathLike[str] | None = None
    max_model_len: int | None = None
    max_lora_rank: int | None = None
    max_loras: int | None = None
    kv_cache_gib: int | None = None
    threads: int | None = None
    force: bool = False
    trust_adapters: bool = False
    deterministic: bool = False
    adapter_roots: tuple[str | os.PathLike[str], ...] = ()
    api_key_file: Path | None = None
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    ssl_ca_certs: Path | None = None
    shutdown_timeout: int = 0
    engine_options: tuple[str, ...] = ()


def plan_server(export: Path, adapters: Mapping[str, Path], options: ServerOptions) -> ServerPlan:
    """Check a base, its adapters and the options, and return the server to start.

    Args:
        export: an export, a checkpoint folder, or a run directory.
        adapters: name -> adapter folder.
        options: what is asked.

    Raises:
        UsageError: options that make no sense, a port that is taken, or a base that needs its adapter without one.
        BindingError: an adapter belongs to another base.
        FormatError: a file is missing or damaged, or an adapter does not fit the base.
        SourceError: the checkpoint has no tokenizer.
        MissingPackageError: the environment lacks vLLM or this package.
    """
    _check_typed(options.engine_options)
    adapters = {key: expand_user(folder) for key, folder in adapters.items()}
    checkpoint = Checkpoint.open(export)
    typed = [option.replace("_", "-") for option in options.engine_options]
    if not any(option.startswith(("--tokenizer", "--skip-tokenizer-init")) for option in typed):
        require_tokenizer(checkpoint.folder)
    own = options.name or derived_name(Path(export))
    check_name(own, kind="model")
    base_name = f"{own}-base" if adapters else own
    for index, adapter_name in enumerate(adapters):
        check_name(adapter_name, taken=(own, base_name, *list(adapters)[:index]))
    if not adapters:
        refuse_alone(checkpoint, "serve the run or an export that holds it, or name it with `adapters=NAME=FOLDER`")
    default = _choose_default(adapters, options.default)
    certificates = Certificates.of(options.ssl_certfile, options.ssl_keyfile, options.ssl_ca_certs)
    access = Access(read_api_key(options.api_key_file), None if certificates is None else certificates.certfile)
    roots = [*(str(folder.resolve()) for folder in adapters.values()), *_resolved_roots(options.adapter_roots)]
    facts = engine_facts(options.python)
    if options.deterministic and facts.cuda:
        raise UsageError("--deterministic is for engines on a CPU, and this one has CUDA; leave it out.")
    kv_cache_gib = choose_kv_cache_gib(checkpoint) if options.kv_cache_gib is None else options.kv_cache_gib
    settings = EngineSettings(
        dtype=options.dtype or ("float16" if facts.cuda else "float32"),
        max_model_len=options.max_model_len,
        max_lora_rank=options.max_lora_rank,
        max_loras=options.max_loras or max(1, min(len(adapters), 8)),
        force=options.force,
        trust_adapters=options.trust_adapters,
        cuda=facts.cuda,
    )
    told = engine_options(checkpoint, adapters, settings, kv_cache_gib=kv_cache_gib)
    # Leaves room for adapters that are loaded while it serves.
    told["max_cpu_loras"] = max(told["max_loras"], len(adapters), 32)
    if options.deterministic:
        # What is compiled for one token may add up in another order than what is compiled for many.
        told["enforce_eager"] = True
    told |= {"served_model_name": base_name, "host": options.host, "port": _take_port(options.host, options.port)}
    told |= {"shutdown_timeout": options.shutdown_timeout, **(certificates.options() if certificates else {})}
    command = [str(options.python or sys.executable), "-m", "vllm.entrypoints.openai.api_server", *_flags(told)]
    if adapters:
        # The default adapter gets the model's own name in the server itself (plugin/guard.py).
        command += [
            "--lora-modules",
            *(json.dumps({"name": key, "path": str(folder.resolve())}) for key, folder in adapters.items()),
        ]
    environment = engine_environment(kv_cache_gib, threads=options.threads) | {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        POLICY_VARIABLE: ServingPolicy(
            own,
            base_name,
            default,
            force=options.force,
            trust_adapters=options.trust_adapters,
            needs_adapter=checkpoint.needs_adapter,
            adapter_roots=roots,
        ).to_text(),
    }
    if options.deterministic:
        environment |= DETERMINISTIC_ENVIRONMENT
    if access.api_key is not None:
        environment[API_KEY_VARIABLE] = access.api_key
    return ServerPlan(
        command=(*command, *options.engine_options),
        environment=environment,
        host=options.host,
        port=told["port"],
        name=own,
        base_name=base_name,
        default=default,
        adapters=adapters,
        options=told,
        needs_adapter=checkpoint.needs_adapter,
        access=access,
        certificates=certificates,
        shutdown_timeout=options.shutdown_timeout,
    )


def _check_typed(options: Sequence[str]) -> None:
    """Refuse options of vLLM's server that are set here, or that run a model's code.

    Raises:
        UsageError: one of them was typed.
    """
    for option in options:
        flag = option.partition("=")[0].replace("_", "-")
        if not flag.startswith("--"):
            continue
        # Its parser takes the beginning of an option for the whole.
        meant = next((known for known in (*_RESERVED, _TRUST, _KEY) if known.startswith(flag)), None)
        if meant in _RESERVED:
            raise UsageError(f"{flag} is set by cloq serve itself; use {_RESERVED[meant]} before the --.")
        if meant == _TRUST:
            raise UsageError(f"{flag} runs Python code that comes with a model, which cloq never does; leave it out.")
        if meant == _KEY:
            raise UsageError(
                f"{flag} would show the key to everybody who lists processes; use --api-key-file before the --, or set "
                f"{API_KEY_VARIABLE}."
            )
        if flag == "--config":
            raise UsageError("--config names a file of options, which are not checked there; give them after the --.")


def _resolved_roots(folders: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return the folders that adapters may be loaded from, as they really lie.

    Raises:
        UsageError: one of them is no folder.
    """
    roots = [expand_user(folder).resolve() for folder in folders]
    for root in roots:
        if not root.is_dir():
            raise UsageError(f"{root} is no folder, so no adapter can be loaded from there; check --adapter-root.")
    return list(map(str, roots))


def _choose_default(adapters: Mapping[str, Path], asked: str | None) -> str | None:
    names = ", ".join(adapters) or "none"
    if asked is not None:
        if asked not in adapters:
            raise UsageError(f"the default adapter {asked!r:.80} is not one of those served: {names}.")
        return asked
    if len(adapters) > 1:
        raise UsageError(
            f"there are {len(adapters)} adapters, {names}; say which one plain requests get with `default=NAME`."
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
            f"{host}:{port} cannot be listened at ({reason}); choose another `port`, or `port=0` for a free one."
        ) from error


def curl_line(plan: ServerPlan) -> str:
    """Return a line that asks the server something, for people to paste."""
    body = json.dumps({"model": plan.name, "prompt": "Hello", "max_tokens": 16})
    quoted = body.replace("'", "'\\''")

    more = "" if plan.access.api_key is None else f' -H "Authorization: Bearer ${API_KEY_VARIABLE}"'
    if plan.certificates is not None:
        more += f" --cacert {shlex.quote(str(plan.certificates.certfile))}"
        if plan.certificates.ca_certs is not None:
            more += " --cert CERTIFICATE --key KEY"
    return f"curl {plan.url}/v1/completions -H 'Content-Type: application/json'{more} -d '{quoted}'"
