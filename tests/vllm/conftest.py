"""Exports of a tiny random Llama with a tokenizer and two adapters, and the interpreter whose vLLM serves them."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import tiny_mixtures
import torch
import transformers
from gate_subjects import write_word_tokenizer

import cloq_export
from cloq_export.artifact.checkpoint_writer import FloatPart, LayerSource, export_checkpoint
from cloq_export.engines.vllm.engine import EngineStart, VllmModel
from cloq_export.engines.vllm.facts import engine_facts
from cloq_export.engines.vllm.options import EngineSettings
from cloq_export.engines.vllm.process import SAFE_PATH
from cloq_export.errors import CloqError
from cloq_export.formats.gptq import GPTQ_V1
from cloq_export.formats.peft import write_adapter
from cloq_export.formats.registry import LAYOUTS
from cloq_export.models.experts import split_experts
from cloq_export.types import LoraPair, QuantizedLayer, QuantSpec

VOCABULARY = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(93))]
PROBES = pathlib.Path(__file__).parent / "probes"
BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
# Where vLLM lives in an environment of its own.
PYTHON_VARIABLE = "CLOQ_EXPORT_TEST_ENGINE_PYTHON"


@dataclasses.dataclass(frozen=True)
class Export:
    """A checkpoint with adapters, as `cloq export` lays it out, and what it was made of."""

    folder: pathlib.Path
    adapters: Mapping[str, pathlib.Path]
    layers: Mapping[str, QuantizedLayer]
    fingerprint: str

    def logprobs(
        self, token_ids: Sequence[int], adapter: str | pathlib.Path | None, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Return what the packed transformers runtime gives, the reference of every engine."""
        folder = self.adapters[adapter] if isinstance(adapter, str) else adapter
        model = _reference(self.folder, folder, dtype)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0].to(torch.float32)
        return torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]

    def greedy(self, token_ids: Sequence[int], adapter: str | None, count: int) -> list[int]:
        """Return the continuation that the same runtime finds likeliest, to the end-of-sequence token at most."""
        model = _reference(self.folder, self.adapters[adapter] if adapter else None, torch.float32)
        ids = list(token_ids)
        for _ in range(count):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == 2:
                break
        return ids[len(token_ids) :]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tests import the scripts whose short forms they are."""
    monkeypatch.syspath_prepend(BENCHMARKS)


@functools.lru_cache(maxsize=64)
def _reference(folder: pathlib.Path, adapter: pathlib.Path | None, dtype: torch.dtype) -> Any:
    return cloq_export.load(folder, adapter, dtype=dtype)


def _rounded(weight: torch.Tensor, spec: QuantSpec, lowest_zero: int) -> QuantizedLayer:
    groups = weight.view(weight.shape[0], spec.group_count(weight.shape[1]), -1)
    if spec.symmetric:
        scales = groups.abs().amax(-1) / 2 ** (spec.bits - 1)
        zeros = torch.full_like(scales, 2 ** (spec.bits - 1))
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = (high - low) / spec.max_code
        zeros = (-low / scales).round().clamp(lowest_zero, spec.max_code)
    scales = scales.to(torch.float16)
    steps = groups / scales.to(torch.float32).unsqueeze(-1)
    codes = (steps.round() + zeros.unsqueeze(-1)).clamp(0, spec.max_code).to(torch.uint8)
    return QuantizedLayer(codes.view(weight.shape), scales, zeros.to(torch.uint8), spec)


def _random_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,  # 32 wide, the narrowest that vLLM's attention computes on a CPU
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.15,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def _write_pairs(
    folder: pathlib.Path, layers: Mapping[str, QuantizedLayer], fingerprint: str, *, seed: int, rank: int = 4
) -> pathlib.Path:
    """Write a random adapter for these layers, whose ranks are `rank` and twice `rank`."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for index, (name, layer) in enumerate(layers.items()):
        own = rank * (1 + index % 2)
        pairs[name] = LoraPair(
            lora_A=(0.1 * torch.randn(own, layer.in_features, generator=generator)).to(torch.float16),
            lora_B=(0.1 * torch.randn(layer.out_features, own, generator=generator)).to(torch.float16),
            alpha=2.0 * own,
        )
    write_adapter(folder, pairs, base_model="random", base_fingerprint=fingerprint)
    return folder


@pytest.fixture(scope="session")
def write_export(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Export]:
    """Return a function from a grid, overrides by suffix and a layout to an export with the adapters one and two."""

    def write(
        spec: QuantSpec,
        *,
        overrides: Mapping[str, QuantSpec | None] | None = None,
        dtype: torch.dtype = torch.float32,
        model: Any = None,
        **options: Any,
    ) -> Export:
        folder = tmp_path_factory.mktemp("exports") / "tiny"
        model = (model or _random_model()).to(dtype)
        layers = {}
        for name, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear) or name == "lm_head":
                continue
            own = next((chosen for suffix, chosen in (overrides or {}).items() if name.endswith(suffix)), spec)
            if own is not None:
                lowest = 1 if options.get("layout") is GPTQ_V1 else 0
                layers[name] = _rounded(module.weight.detach().to(torch.float32), own, lowest)
        source = LayerSource.of_mapping(layers)
        fingerprint = export_checkpoint(folder, source, FloatPart.of_model(model, source), **options)
        write_word_tokenizer(folder, VOCABULARY)
        (folder / "adapters").mkdir()
        adapters = {
            name: _write_pairs(folder / "adapters" / name, layers, fingerprint, seed=seed)
            for name, seed in (("one", 1), ("two", 2))
        }
        return Export(folder, adapters, layers, fingerprint)

    return write


@pytest.fixture
def mixture(monkeypatch: pytest.MonkeyPatch, write_export: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function from a family to a 2-bit export with two adapters, wide enough for vLLM's attention."""
    monkeypatch.setitem(tiny_mixtures._SIZES, "hidden_size", 128)
    for _, options in tiny_mixtures.MIXTURES.values():
        if options.get("head_dim"):
            monkeypatch.setitem(options, "head_dim", 32)

    def write(family: str, layout: str = "gptq_v2", **options: Any) -> Any:
        model = tiny_mixtures.build_mixture(family)
        split_experts(model)
        overrides = {"gate": None, "router.layer": None, **options.pop("overrides", {})}
        return write_export(
            QuantSpec(bits=2, group_size=32), model=model, layout=LAYOUTS[layout], overrides=overrides, **options
        )

    return write


@pytest.fixture(scope="session")
def write_float_model() -> Callable[[pathlib.Path], pathlib.Path]:
    """Return a function that writes the model of the exports, as it was before it was rounded."""

    def write(folder: pathlib.Path) -> pathlib.Path:
        _random_model().save_pretrained(folder)
        write_word_tokenizer(folder, VOCABULARY)
        return folder

    return write


@pytest.fixture(scope="session")
def write_pairs() -> Callable[..., pathlib.Path]:
    return _write_pairs


@pytest.fixture(scope="session")
def export(write_export: Callable[..., Export]) -> Export:
    """Return a 2-bit export, for tests that only read."""
    return write_export(QuantSpec(bits=2, group_size=32))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Return what the engines compute on, "cpu" or "cuda"."""
    return str(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def engine_python(device: str) -> str:
    """Return the interpreter whose vLLM is tested: this one, or the one that the environment names."""
    python = os.environ.get(PYTHON_VARIABLE, sys.executable)
    try:
        facts = engine_facts(python)
    except CloqError as error:
        pytest.fail(f"these tests need vLLM ({error}); or set {PYTHON_VARIABLE} to an interpreter that has it")
    if device == "cuda" and not pathlib.Path("/dev/nvidiactl").exists():
        pytest.skip("there is no NVIDIA GPU")
    if facts.cuda != (device == "cuda"):
        pytest.fail(f"the vLLM of {python} computes on {'cuda' if facts.cuda else 'cpu'}; choose it with --device")
    return python


@pytest.fixture
def only_on_cpu(device: str) -> None:
    """Skip a test of code that vLLM, or this package, has for the CPU alone."""
    if device == "cuda":
        pytest.skip("this is about computing on the CPU")


Loader = Callable[..., VllmModel]


@pytest.fixture(scope="session")
def load_engine(engine_python: str, device: str) -> Iterator[Loader]:
    """Return a function from an export, adapters and options to an engine that serves them until the next call.

    A start takes longer than most tests, so all share one process, and another one without this package's plugin.
    """
    running: dict[bool, VllmModel] = {}

    def load(export: pathlib.Path, adapters: Mapping[str, pathlib.Path], *, plugin: bool = True, **how: Any) -> Any:
        how.setdefault("dtype", "float32" if device == "cpu" else "float16")
        if device == "cuda":
            how["more"] = {"gpu_memory_utilization": 0.2} | how.get("more", {})
        if plugin in running and running[plugin]._process.exit_code is None:  # a test may have meant to end it
            running[plugin].load(export, adapters, EngineSettings(**how))
            return running[plugin]
        start = EngineStart(python=engine_python, threads=1, plugin=plugin, timeout=600)
        running[plugin] = VllmModel(export, adapters, EngineSettings(**how), start)
        return running[plugin]

    yield load
    for model in running.values():
        model.close()


@pytest.fixture(scope="session")
def probe(engine_python: str) -> Callable[..., Any]:
    """Return a function that runs a script of `probes` with the engine's interpreter and returns its JSON."""

    def run(script: str, *arguments: Any, **environment: str) -> Any:
        done = subprocess.run(
            [engine_python, str(PROBES / script), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=600,
            # In the project's root an engine's own interpreters would take our `kernels` for the library of that name.
            env=os.environ | {"OMP_NUM_THREADS": "1", **SAFE_PATH, **environment},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
