"""A vLLM engine in a process of its own, asked for log-probabilities and greedy continuations of token ids.

The engine may run in another environment than the caller: vLLM pins its libraries narrowly. That environment needs
this package too, for the plugin. Run as a module, this file is the engine's side.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.empty_model import tie_entries
from cloq_export.artifact.quantization_description import CONFIG_NAME
from cloq_export.engines.vllm.plugin import adapters as adapter_rules
from cloq_export.errors import EngineError, FormatError, UsageError

DTYPES = ("float32", "float16", "bfloat16")
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_TAIL_LINES = 40
# Keeps the working folder out of the modules that an interpreter finds: a folder there may have a library's name.
SAFE_PATH = {"PYTHONSAFEPATH": "1"}
_GIB = 1 << 30


class EngineProcess:
    """A program whose output is read all the time and whose last lines are kept, stopped with all of its children.

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
        self._lines: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        try:
            self._process = subprocess.Popen(
                list(command),
                env=os.environ | SAFE_PATH | dict(environment),
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
            raise EngineError(f"{command[0]} cannot be started: {error.strerror or error}; check --python.") from error
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._stop_at_exit = weakref.finalize(self, _kill_group, self._process)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line.rstrip("\n"))
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
            self.wait(seconds)
        self._stop_at_exit()
        self._reader.join(timeout=5)
        if self._process.stdout is not None and not self._reader.is_alive():
            self._process.stdout.close()


def _kill_group(process: subprocess.Popen[str]) -> None:
    """End a program and whatever it left running in its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)


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


def engine_options(
    checkpoint: Checkpoint,
    adapters: Mapping[str, Path],
    *,
    dtype: str,
    kv_cache_gib: int,
    max_model_len: int | None = None,
    max_lora_rank: int | None = None,
    max_loras: int | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Return vLLM's options for a base and its adapters, after checking each of them.

    Args:
        checkpoint: the base.
        adapters: name -> folder.
        dtype: of the activations.
        kv_cache_gib: memory for keys and values.
        max_model_len: longest prompt with its answer; None takes the model's own length, or what the memory holds.
        max_lora_rank: rank that adapters may have; None takes the least value that these need.
        max_loras: adapters in one batch; None takes all of these.
        force: take adapters of another base.

    Returns:
        dict: keyword arguments of vLLM's `LLM`; as options of its server, underscores are dashes.

    Raises:
        UsageError: a dtype, a rank or a name is not allowed.
        BindingError: an adapter belongs to another base.
        FormatError: a file is damaged, or an adapter does not fit the base.
    """
    if dtype not in DTYPES:
        raise UsageError(f"the dtype is {dtype!r:.40}; allowed are {', '.join(DTYPES)}.")
    if max_lora_rank is not None and max_lora_rank not in adapter_rules.RANKS:
        allowed = ", ".join(map(str, adapter_rules.RANKS))
        raise UsageError(f"the largest rank is {max_lora_rank}; vLLM takes {allowed}.")
    entries = tie_entries(checkpoint)
    if entries:
        raise FormatError(
            f"{checkpoint.folder / CONFIG_NAME} ties head and embeddings, and the files hold two that differ; vLLM "
            "goes by the config and would serve another model. Set tie_word_embeddings to false wherever it stands, "
            "or write the folder again with cloq export."
        )
    options: dict[str, Any] = {
        "model": str(checkpoint.folder),
        "dtype": dtype,
        "max_model_len": max_model_len or _context_length(checkpoint.config, dtype, kv_cache_gib),
    }
    if checkpoint.grids.layout.quant_method == "gptq" and dtype == "float32":
        # vLLM's own GPTQ kernels have no float32.
        options["quantization"] = "cloq"
    targets = adapter_rules.quantized_suffixes(checkpoint)
    ranks = [1]
    for folder in adapters.values():
        adapter = adapter_rules.check_adapter(checkpoint, folder, max_rank=max_lora_rank, force=force)
        ranks += [pair.rank for pair in adapter.pairs.values()]
        targets |= {module.rpartition(".")[2] for module in adapter.pairs}
    if adapters or max_lora_rank is not None or max_loras is not None:
        options |= {
            "enable_lora": True,
            "max_lora_rank": max_lora_rank or adapter_rules.smallest_rank(ranks),
            "max_loras": max_loras or max(1, len(adapters)),
            # Without this list vLLM adapts the head too, and 0.32 then dies of log-probabilities of a prompt.
            "lora_target_modules": sorted(targets),
        }
        options["max_cpu_loras"] = max(options["max_loras"], len(adapters))
    return options


def _context_length(config: Mapping[str, Any], dtype: str, kv_cache_gib: int) -> int:
    """Return the model's own length, or what the memory for keys and values holds."""
    sizes = {name: config.get(name) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")}
    longest = config.get("max_position_embeddings")
    longest = longest if isinstance(longest, int) and longest > 0 else 2048
    if not all(isinstance(size, int) and size > 0 for size in sizes.values()):
        return longest
    heads = config.get("num_key_value_heads") or sizes["num_attention_heads"]
    width = config.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]  # type: ignore[operator]
    per_token = 2 * sizes["num_hidden_layers"] * heads * width * _DTYPE_BYTES[dtype]  # type: ignore[operator]
    held = int(0.9 * kv_cache_gib * _GIB) // per_token
    # vLLM gives memory out in blocks of tokens.
    return min(longest, max(16, held // 128 * 128))


class VllmModel:
    """An engine with one base and its adapters, loaded and ready.

    Args:
        export: as in `load`.
        adapters: as in `load`.
        python: the interpreter of the engine's environment; None is this one.
        kv_cache_gib: memory for keys and values on the CPU.
        threads: threads on the CPU; None leaves it to vLLM.
        plugin: False leaves this package's plugin out, to see what vLLM does by itself.
        timeout: seconds after which a start or an answer is given up.
        how: more keyword arguments of `load`.

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
        *,
        python: str | os.PathLike[str] | None = None,
        kv_cache_gib: int = 1,
        threads: int | None = None,
        plugin: bool = True,
        timeout: float = 900,
        **how: Any,
    ) -> None:
        self._timeout, self._kv_cache_gib, self._plugin = timeout, kv_cache_gib, plugin
        self._lock = threading.Lock()
        # Files and options first: they cost nothing beside a start.
        request = self._loading(export, adapters, **how)
        variables = engine_environment(kv_cache_gib, threads=threads) | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        if not plugin:
            variables["VLLM_PLUGINS"] = "none-of-them"
        asked, asking = os.pipe()
        answering, answered = os.pipe()
        command = [str(python or sys.executable), "-m", __name__, str(asked), str(answered)]
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

    def load(self, export: Path, adapters: Mapping[str, Path], **how: Any) -> None:
        """Serve other files with the same process, in the place of those before; that spares the start.

        Args:
            export: an export, a checkpoint folder, or a run directory.
            adapters: name -> adapter folder.
            how: keyword arguments: "dtype" of the activations ("float32", "float16" or "bfloat16"); "enforce_eager",
                False compiles the model; "max_model_len", the longest prompt with its answer, None takes the model's
                own length or what the memory holds; "max_loras", adapters in one batch, None takes all; "force" takes
                adapters of another base; "options", more keyword arguments of vLLM's `LLM`.

        Raises:
            CloqError: as the class.
        """
        self._load(self._loading(export, adapters, **how))

    def _load(self, request: Mapping[str, Any]) -> None:
        try:
            self._ask(request, "start")
        except BaseException:
            self.close()
            raise

    def _loading(
        self,
        export: Path,
        adapters: Mapping[str, Path],
        *,
        dtype: str = "float32",
        enforce_eager: bool = True,
        max_model_len: int | None = None,
        max_loras: int | None = None,
        force: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the request that makes the engine load these files, after checking them."""
        folders = {name: Path(folder) for name, folder in adapters.items()}
        chosen = engine_options(
            Checkpoint.open(export),
            folders,
            dtype=dtype,
            kv_cache_gib=self._kv_cache_gib,
            max_model_len=max_model_len,
            max_loras=max_loras,
            force=force,
        )
        if not self._plugin:
            chosen.pop("quantization", None)
        chosen |= {
            "enforce_eager": enforce_eager,
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            **(options or {}),
        }
        self.adapters = folders
        return {
            "options": chosen,
            "adapters": {name: [number, str(folders[name])] for number, name in enumerate(folders, 1)},
            "force": force,
        }

    @property
    def is_running(self) -> bool:
        """Return whether the engine's process runs."""
        return self._process.exit_code is None

    def prompt_logprobs(self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None]) -> list[torch.Tensor]:
        """Return the log-probability of every token given those before it, for all sequences in one batch.

        Args:
            token_ids: sequences of n tokens.
            adapters: the adapter of each; None is the base alone.

        Returns:
            list: one (n - 1,) float32 tensor for every sequence, for the tokens 1 to n - 1.

        Raises:
            UsageError: an adapter is not one of this model, or a sequence is empty.
            EngineError: the engine died or refused.
        """
        answer = self._ask({"prompt_logprobs": self._requests(token_ids, adapters)}, "answer")
        return [torch.tensor(values, dtype=torch.float32) for values in answer]

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
                reason = f"gave no {what} within {self._timeout:g} seconds and was stopped"
            else:
                reason = f"ended without an {what}" if what == "answer" else "did not start"
            raise EngineError(
                f"the vLLM engine {reason} (exit code {self._process.exit_code}); its last lines:\n"
                f"{self._process.last_lines()}"
            )
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

        timer = threading.Timer(self._timeout, stop)
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


def _serve(asked: IO[str], answered: IO[str]) -> None:
    """Answer the lines of a `VllmModel`; the first one says what to load, and a later one may say it again."""
    try:
        from vllm import LLM
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
        from vllm.exceptions import VLLMClientError
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        _answer(answered, {"error": f"vLLM cannot be imported by {sys.executable} ({error}); install it there"})
        return
    engine: Any = None
    lora: dict[str, Any] = {}
    for line in asked:
        request = json.loads(line)
        if "options" in request:
            if engine is not None:
                engine = None
                cleanup_dist_env_and_memory()
            os.environ.pop(adapter_rules.POLICY_VARIABLE, None)
            if request["force"]:
                os.environ[adapter_rules.POLICY_VARIABLE] = adapter_rules.ServingPolicy("", "", force=True).to_text()
            engine = LLM(**request["options"])
            lora = {name: LoRARequest(name, number, folder) for name, (number, folder) in request["adapters"].items()}
            _answer(answered, {"result": "ready"})
            continue
        try:
            _answer(answered, {"result": _compute(engine, lora, request)})
        except VLLMClientError as error:  # the request's fault; anything else ends the engine
            _answer(answered, {"error": " ".join(str(error).split())[:500]})


def _compute(engine: Any, lora: Mapping[str, Any], request: Mapping[str, Any]) -> list[Any]:
    from vllm import SamplingParams

    scoring = "prompt_logprobs" in request
    batch = request["prompt_logprobs" if scoring else "generate"]
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=1 if scoring else request["max_new_tokens"],
        prompt_logprobs=0 if scoring else None,
        detokenize=False,
    )
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for ids, _ in batch],
        sampling,
        lora_request=[None if name is None else lora[name] for _, name in batch] if lora else None,
        use_tqdm=False,
    )
    if not scoring:
        return [list(output.outputs[0].token_ids) for output in outputs]
    return [
        [scores[token].logprob for token, scores in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
        for (ids, _), output in zip(batch, outputs, strict=True)
    ]


def _answer(answered: IO[str], message: Mapping[str, Any]) -> None:
    answered.write(json.dumps(message) + "\n")
    answered.flush()


if __name__ == "__main__":
    with os.fdopen(int(sys.argv[1])) as asked, os.fdopen(int(sys.argv[2]), "w") as answered:
        try:
            _serve(asked, answered)
        except BrokenPipeError:
            pass  # whoever asked has gone
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    # vLLM's own threads and processes can keep an interpreter that has nothing left to do.
    os._exit(0)
