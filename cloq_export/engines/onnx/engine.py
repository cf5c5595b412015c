"""An ONNX export served by plain ONNX Runtime: log-probabilities and greedy text for token ids, adapters in turn."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from cloq_export.artifact.adapters import read_bound_adapter
from cloq_export.engines.alternatives import Alternatives
from cloq_export.engines.onnx.export import ACCURACY_OPTION
from cloq_export.engines.onnx.float_graph import GENAI_CONFIG
from cloq_export.engines.protocol import TokenDistributions
from cloq_export.errors import FormatError, NonFiniteError, UsageError
from cloq_export.files.safe_json import read_json
from cloq_export.formats.onnx.adapter import (
    is_onnx_adapter,
    require_fit,
    save_adapter,
)
from cloq_export.formats.onnx.reading import OnnxExport
from cloq_export.formats.onnx.record import ADAPTER_NAME, GRAPH_NAME

_PROVIDERS = ("CPUExecutionProvider",)


class OnnxModel:
    """A session over an export, with the adapters that it switches between.

    One request is computed at a time, with one adapter or none: ONNX Runtime takes several active adapters and uses
    the first one silently, so several at once cannot be asked for here.

    Args:
        folder: the export.
        adapters: name -> adapter folder, of this layout or of PEFT's.
        threads: of the session; None takes OMP_NUM_THREADS, or leaves it to ONNX Runtime.
        force: take adapters of another base.

    Raises:
        FormatError: a file is damaged, or the graph has inputs that only an engine of another kind can fill.
        BindingError: an adapter belongs to another base, or the graph has no inputs for it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        adapters: Mapping[str, Path] | None = None,
        *,
        threads: int | None = None,
        force: bool = False,
    ) -> None:
        self.export = OnnxExport.open(folder)
        config = read_json(Path(folder) / GENAI_CONFIG).get("model")
        self._decoder = _decoder_of(config, Path(folder))
        self._ends = _ends_of(config)
        self._adapters = {name: self._load_adapter(place, force=force) for name, place in (adapters or {}).items()}
        self._session = onnxruntime.InferenceSession(
            str(Path(folder) / GRAPH_NAME), self._options(threads), providers=list(_PROVIDERS)
        )
        self._cache_shape = (int(self._decoder["num_key_value_heads"]), 0, int(self._decoder["head_size"]))
        layers = range(int(self._decoder["num_hidden_layers"]))
        names, results = self._decoder["inputs"], self._decoder["outputs"]
        self._past = [names[key] % layer for layer in layers for key in ("past_key_names", "past_value_names")]
        self._present = [
            results[key] % layer for layer in layers for key in ("present_key_names", "present_value_names")
        ]
        self._inputs = {value.name for value in self._session.get_inputs()}
        odd = sorted(self._inputs - {"input_ids", "attention_mask", "position_ids", *self._past})
        if odd or not self._inputs >= {"input_ids", *self._past}:
            raise FormatError(
                f"{folder} has the graph inputs {', '.join(odd) or 'of no decoder'}, which this runtime cannot fill; "
                "serve it with onnxruntime-genai."
            )

    def prompt_logprobs(self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None]) -> list[torch.Tensor]:
        """Return log p(x_i | x_1..x_{i-1}), i = 2..n, of each sequence; see `engines.protocol.ServedModel`.

        Raises:
            UsageError: a sequence has less than two tokens, or an adapter is unknown.
        """
        results = []
        for ids, adapter in zip(token_ids, adapters, strict=True):
            if len(ids) < 2:
                raise UsageError(f"a sequence has {len(ids)} tokens; at least 2 are needed.")
            logits = torch.from_numpy(self.logits(ids, adapter)[:-1])
            targets = torch.tensor(ids[1:], dtype=torch.int64)
            results.append(-torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
        return results

    def token_distributions(
        self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None]
    ) -> list[TokenDistributions]:
        """Return the log-probabilities of the whole vocabulary; see `engines.protocol.ServedModel`.

        Raises:
            UsageError: an adapter is unknown.
        """
        return [
            TokenDistributions(torch.from_numpy(self.logits(ids, adapter)[:-1]).log_softmax(-1))
            for ids, adapter in zip(token_ids, adapters, strict=True)
        ]

    def alternative_logprobs(
        self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None], count: int
    ) -> list[Alternatives]:
        """Return log-probabilities of the next token and of the most probable others; see `ServedModel`.

        Raises:
            UsageError: an adapter is unknown.
        """
        return [
            Alternatives.of_logits(torch.from_numpy(self.logits(ids, adapter)[:-1]), torch.tensor(ids[1:]), count)
            for ids, adapter in zip(token_ids, adapters, strict=True)
        ]

    def generate(
        self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None], max_new_tokens: int
    ) -> list[list[int]]:
        """Return the most probable continuation of each prompt; see `engines.protocol.ServedModel`.

        Raises:
            UsageError: a prompt is empty, or an adapter is unknown.
            NonFiniteError: the graph gives NaN or Inf.
        """
        return [self._continued(ids, adapter, max_new_tokens) for ids, adapter in zip(token_ids, adapters, strict=True)]

    def logits(self, ids: Sequence[int], adapter: str | Sequence[str] | None = None) -> np.ndarray:
        """Return the logits of one sequence, (n, vocabulary) float32.

        Args:
            ids: token ids.
            adapter: the name of one adapter; None is the base alone.

        Raises:
            UsageError: the adapter is unknown, or several are given.
        """
        logits: np.ndarray = self._step(ids, len(ids), self._empty_cache(), self._run_options(adapter))[0][0]
        return logits

    def close(self) -> None:
        """Let go of the session."""
        self._adapters.clear()
        del self._session

    def _continued(self, ids: Sequence[int], adapter: str | None, max_new_tokens: int) -> list[int]:
        if not ids:
            raise UsageError("a prompt has no token; at least 1 is needed.")
        options, cache, given, text = self._run_options(adapter), self._empty_cache(), list(ids), []
        length = len(ids)
        for _ in range(max_new_tokens):
            logits, cache = self._step(given, length, cache, options)
            last = logits[0, -1]
            if not np.isfinite(last).all():
                raise NonFiniteError("the graph gives NaN or Inf while it generates; export and verify it again.")
            token = int(last.argmax())
            text.append(token)
            if token in self._ends:
                break
            given, length = [token], length + 1
        return text

    def _step(
        self, ids: Sequence[int], length: int, cache: Mapping[str, Any], options: onnxruntime.RunOptions
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the logits of the new tokens of a text of `length` tokens, and its keys and values."""
        feed: dict[str, Any] = {"input_ids": np.asarray([ids], dtype=np.int64), **cache}
        if "attention_mask" in self._inputs:
            feed["attention_mask"] = np.ones((1, length), dtype=np.int64)
        if "position_ids" in self._inputs:
            feed["position_ids"] = np.arange(length - len(ids), length, dtype=np.int64)[None]
        logits, *present = self._session.run([self._decoder["outputs"]["logits"], *self._present], feed, options)
        return logits, dict(zip(self._past, present, strict=True))

    def _empty_cache(self) -> dict[str, np.ndarray]:
        return {name: np.zeros((1, *self._cache_shape), dtype=np.float32) for name in self._past}

    def _run_options(self, adapter: str | Sequence[str] | None) -> onnxruntime.RunOptions:
        options = onnxruntime.RunOptions()
        if adapter is None:
            return options
        if not isinstance(adapter, str):
            raise UsageError(
                f"{len(adapter)} adapters were asked for at once; ONNX Runtime would use the first one and ignore the "
                "others: ask for one at a time."
            )
        if adapter not in self._adapters:
            raise UsageError(f"there is no adapter {adapter!r}; there are {', '.join(self._adapters) or 'none'}.")
        options.add_active_adapter(self._adapters[adapter])
        return options

    def _options(self, threads: int | None) -> onnxruntime.SessionOptions:
        options = onnxruntime.SessionOptions()
        count = threads or int(os.environ.get("OMP_NUM_THREADS") or 0)
        options.intra_op_num_threads = count
        # Errors are raised; its other messages are for its own developers.
        options.log_severity_level = 4
        level = max(module.blocks.accuracy_level for module in self.export.record.modules.values())
        options.add_session_config_entry(ACCURACY_OPTION, str(level))
        return options

    def _load_adapter(self, folder: Path, *, force: bool) -> onnxruntime.LoraAdapter:
        """Return an adapter of this base, from its own file or made from a PEFT adapter."""
        read = read_bound_adapter(folder, self.export, force=force)
        require_fit(read.pairs, self.export.shapes, str(folder))
        adapter = onnxruntime.LoraAdapter()
        if is_onnx_adapter(folder):
            adapter.Load(str(folder / ADAPTER_NAME))
            return adapter
        with tempfile.TemporaryDirectory(prefix="cloq-onnx-") as place:
            path = Path(place) / ADAPTER_NAME
            save_adapter(path, read.pairs, self.export.fingerprint)
            adapter.Load(str(path))
        return adapter


def _decoder_of(config: Any, folder: Path) -> dict[str, Any]:
    """Return the decoder's part of genai_config.json, as far as it is needed here."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        decoder: dict[str, Any] = config["decoder"]
        for key in ("num_hidden_layers", "num_key_value_heads", "head_size"):
            int(decoder[key])
        for side, names in (("inputs", "past"), ("outputs", "present")):
            patterns = [decoder[side][f"{names}_{part}_names"] for part in ("key", "value")]
            if not all(isinstance(pattern, str) and pattern % 0 for pattern in patterns):
                raise ValueError
        if isinstance(decoder["outputs"]["logits"], str):
            return decoder
    raise FormatError(f"{folder / GENAI_CONFIG} describes no decoder with a cache of keys and values; write it again.")


def _ends_of(config: Any) -> frozenset[int]:
    ends = config.get("eos_token_id")
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
