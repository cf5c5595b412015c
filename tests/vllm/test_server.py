"""A server of `cloq serve` for real: names, default, guarded adapters, several clients."""

from __future__ import annotations

import concurrent.futures
import importlib
import pathlib
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
from cloq_serve import await_silence, served

import cloq_export
from cloq_export.engines.transformers.served import packed_model
from cloq_export.engines.vllm.client import ServerClient
from cloq_export.errors import EngineError, GateMissedError, UsageError
from cloq_export.integrations.trl import AdapterRollouts, RolloutOptions
from cloq_export.parity.canary import SyncCanary
from cloq_export.types import QuantSpec

pytestmark = pytest.mark.slow

GENERATOR = torch.Generator().manual_seed(3)
SEQUENCES = [torch.randint(3, 96, (length,), generator=GENERATOR).tolist() for length in (12, 5, 9, 2, 17, 30, 7)]


Running = tuple["subprocess.Popen[str]", ServerClient]


@pytest.fixture(scope="module")
def running(export: Any, engine_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Return a server of `cloq serve` that takes two adapters in one batch, and a client for it."""
    root = tmp_path_factory.getbasetemp()
    with served(export.folder, export.adapters, engine_python, "--adapter-root", str(root)) as (process, client, _):
        yield process, client


@pytest.fixture
def server(running: Running) -> ServerClient:
    return running[1]


def test_the_default_adapter_answers_to_the_models_own_name(server: ServerClient, export: Any) -> None:
    assert server.models() == ["tiny", "one", "two", "tiny-base"]
    ids = SEQUENCES[0]
    greedy = {name: server.generate([ids], [name], 8)[0] for name in (None, "one", "two")}
    assert greedy["one"] != greedy[None]
    for model in ({"model": "tiny"}, {}):
        answer = server._post(
            "/v1/completions",
            {**model, "prompt": ids, "max_tokens": 8, "temperature": 0, "return_token_ids": True},
        )
        assert answer["model"] == "tiny"
        assert answer["choices"][0]["token_ids"] == greedy["one"]


def test_clients_at_once_get_what_the_reference_gives(server: ServerClient, export: Any) -> None:
    names: list[str | None] = [None, "one", "two"]
    who = [names[index % 3] for index in range(21)]
    sequences = [SEQUENCES[index % len(SEQUENCES)] for index in range(21)]
    for ids, name, scores in zip(sequences, who, server.prompt_logprobs(sequences, who), strict=True):
        assert float((scores - export.logprobs(ids, name)).abs().max()) < 1e-4


def test_the_most_probable_tokens_of_each_place(server: ServerClient, export: Any) -> None:
    ids = SEQUENCES[0]
    found = server.token_distributions([ids, ids], ["two", None])[0]
    expected = packed_model(export.folder, export.adapters).token_distributions([ids], ["two"])[0].logprobs
    assert found.token_ids is not None
    assert torch.allclose(found.logprobs, expected.gather(1, found.token_ids), atol=1e-4)
    assert torch.allclose(found.logprobs, expected.topk(found.logprobs.shape[1]).values, atol=1e-4)


def test_a_canary_sees_each_sync_of_a_trainer(server: ServerClient, export: Any, tmp_path: pathlib.Path) -> None:
    cloq_export.register()
    base = transformers.AutoModelForCausalLM.from_pretrained(export.folder)
    model = peft.PeftModel.from_pretrained(base, export.adapters["one"], is_trainable=True)
    canary = SyncCanary(model, server, [SEQUENCES[4], SEQUENCES[6]], needs_weights=True)
    assert canary.check(0, "one").same_weights
    for number in (1, 2):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / f"step{number}")
        server.load_adapter(f"policy-{number}", tmp_path / f"step{number}")
        found = canary.check(number, f"policy-{number}")
        assert found.same_weights
        assert found.logprob_difference_max < 1e-4
        assert found.divergence.estimate == "lower bound"
        with pytest.raises(GateMissedError, match=f"step {number}: in 14 of 14 modules of one the engine holds other"):
            canary.check(number, "one")
    with pytest.raises(UsageError, match="the server has no adapter 'policy-3'"):
        canary.check(3, "policy-3")
    for number in (1, 2):
        server.unload_adapter(f"policy-{number}")


def test_grpo_learns_on_what_is_served(
    server: ServerClient, export: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # TRL warns that what it calls `rollout_func` may change; the bounds of the extra `rl` see to that.
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    # Here, so that without the extra `rl` this test alone fails.
    import datasets
    import trl

    cloq_export.register()
    base = transformers.AutoModelForCausalLM.from_pretrained(export.folder)
    model = peft.PeftModel.from_pretrained(base, export.adapters["one"], is_trainable=True)
    started = {name: value.detach().clone() for name, value in model.named_parameters() if ".lora_" in name}
    canary = SyncCanary(model, server, [SEQUENCES[4], SEQUENCES[5]], needs_weights=True)
    rollouts = AdapterRollouts(server, tmp_path / "sync", RolloutOptions("grpo"), canary)
    seen: list[list[int]] = []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.extend(completion_ids)
        return [float(sum(token % 2 for token in ids)) for ids in completion_ids]

    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        train_dataset=datasets.Dataset.from_list([{"prompt": f"w{n} w{n + 1} w{n + 2}"} for n in range(8)]),
        processing_class=transformers.AutoTokenizer.from_pretrained(export.folder, pad_token="</s>"),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=6,
            max_steps=3,
            learning_rate=1e-2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
        ),
        rollout_func=rollouts,
    )
    trainer.train()
    assert len(seen) == 12
    assert rollouts.served_as == "grpo-2"
    assert "grpo-2" in server.models()
    assert "grpo-1" not in server.models()
    now = dict(model.named_parameters())
    assert any(not torch.equal(now[name], before) for name, before in started.items())
    server.unload_adapter("grpo-2")


def test_the_server_lists_alternatives(server: ServerClient, export: Any) -> None:
    listed = server.alternative_logprobs(SEQUENCES[:2], [None, "two"], 19)
    for ids, name, found in zip(SEQUENCES, [None, "two"], listed, strict=False):
        assert found.tokens.shape == (len(ids) - 1, 20)
        assert found.tokens[:, 0].tolist() == list(ids[1:])
        assert float((found.logprobs[:, 0] - export.logprobs(ids, name)).abs().max()) < 1e-4
        assert (found.logprobs[:, 1:].diff(dim=1) <= 0).all()


def test_adapters_come_and_go_while_it_serves(
    server: ServerClient, export: Any, write_pairs: Callable[..., pathlib.Path], tmp_path: pathlib.Path
) -> None:
    ids = SEQUENCES[4]
    for seed in (11, 12, 13):
        folder = write_pairs(tmp_path / f"adapter{seed}", export.layers, export.fingerprint, seed=seed)
        server.load_adapter("third", folder)
        scores = server.prompt_logprobs([ids, ids, ids], ["third", None, "two"])
        for name, found in zip((folder, None, "two"), scores, strict=True):
            assert float((found - export.logprobs(ids, name)).abs().max()) < 1e-4
        server.unload_adapter("third")
    assert server.models() == ["tiny", "one", "two", "tiny-base"]


def test_what_is_refused_while_it_serves(
    server: ServerClient,
    export: Any,
    write_export: Callable[..., Any],
    write_pairs: Callable[..., pathlib.Path],
    tmp_path: pathlib.Path,
) -> None:
    good = export.adapters["one"]
    other = write_export(QuantSpec(bits=3, group_size=32)).adapters["one"]
    large = write_pairs(tmp_path / "large", export.layers, export.fingerprint, seed=1, rank=16)
    torn = write_pairs(tmp_path / "torn", export.layers, export.fingerprint, seed=1)
    (torn / "adapter_model.safetensors").unlink()
    link, leaky = tmp_path / "link", tmp_path / "leaky"
    link.symlink_to(pathlib.Path(__file__).parent)
    shutil.copytree(good, leaky)
    (leaky / "adapter_model.safetensors").unlink()
    (leaky / "adapter_model.safetensors").symlink_to("/etc/adapter_model.safetensors")
    before = server.generate([SEQUENCES[0]], ["two"], 4)
    for name, folder, reason in (
        ("a/b", good, "has a slash"),
        ("one", good, "already been loaded"),
        ("tiny-base", good, "conflicts with a served base model"),
        ("third", other, "is bound to the base"),
        ("third", large, "the server takes up to 8"),
        ("third", torn, "does not exist"),
        ("third", tmp_path / "none", "is no adapter folder"),
        ("third", pathlib.Path(__file__).parent, "lies in no folder that adapters may be loaded from"),
        ("third", f"{tmp_path}/{'../' * len(tmp_path.parts)}etc", "lies in no folder that adapters may be loaded from"),
        ("third", link, "lies in no folder that adapters may be loaded from"),
        ("third", leaky, "lies in no folder that adapters may be loaded from .* --adapter-root FOLDER"),
    ):
        with pytest.raises(EngineError, match=f"400.*{reason}"):
            server._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
    for name in ("tiny", "one"):
        with pytest.raises(
            EngineError, match=f"{name} is what plain requests are answered with and cannot be unloaded"
        ):
            server.unload_adapter(name)
    with pytest.raises(EngineError, match="one is what plain requests are answered with and cannot be replaced"):
        server._post(
            "/v1/load_lora_adapter",
            {"lora_name": "one", "lora_path": str(export.adapters["two"]), "load_inplace": True},
        )
    assert server.models() == ["tiny", "one", "two", "tiny-base"]
    assert server.generate([SEQUENCES[0]], ["two"], 4) == before


def test_a_name_with_other_weights_never_meets_what_was_computed_with_those_before(
    server: ServerClient, export: Any, write_pairs: Callable[..., pathlib.Path], tmp_path: pathlib.Path
) -> None:
    """One folder, written anew and loaded again: after unloading or in its place, under every spelling of its path."""
    folder, link = tmp_path / "changing", tmp_path / "link"
    link.symlink_to(folder)
    spellings = [folder, f"{folder}/", f"{folder}/../changing", link, folder]
    # Long enough for whole blocks of the prompt to be kept.
    prompt = [3 + position * 7 % 90 for position in range(200)]

    def answer() -> list[float]:
        choice = server.complete(prompt, "changing", max_tokens=1, logprobs=5)
        return [round(float(value), 4) for value in choice["logprobs"]["top_logprobs"][0].values()]

    def load(spelling: pathlib.Path | str, **how: bool) -> None:
        content = {"lora_name": "changing", "lora_path": str(spelling), **how}
        server._post("/v1/load_lora_adapter", content)

    fresh: dict[int, list[float]] = {}
    for seed in (21, 22):  # each from a folder of its own, under a name of its own
        own = write_pairs(tmp_path / f"own{seed}", export.layers, export.fingerprint, seed=seed)
        server.load_adapter(f"own{seed}", own)
        choice = server.complete(prompt, f"own{seed}", max_tokens=1, logprobs=5)
        fresh[seed] = [round(float(value), 4) for value in choice["logprobs"]["top_logprobs"][0].values()]
        server.unload_adapter(f"own{seed}")
    assert fresh[21] != fresh[22]

    for number, spelling in enumerate(spellings):
        seed = 21 + number % 2
        write_pairs(folder, export.layers, export.fingerprint, seed=seed)
        load(spelling)
        assert answer() == answer() == fresh[seed], spelling
        server.unload_adapter("changing")
    load(folder)
    for number, spelling in enumerate(spellings):
        seed = 22 - number % 2
        write_pairs(folder, export.layers, export.fingerprint, seed=seed)
        load(spelling, load_inplace=True)
        assert answer() == answer() == fresh[seed], spelling
    server.unload_adapter("changing")


def test_requests_under_way_keep_the_weights_that_they_began_with(
    server: ServerClient, export: Any, write_pairs: Callable[..., pathlib.Path], tmp_path: pathlib.Path
) -> None:
    folders = {
        seed: write_pairs(tmp_path / f"adapter{seed}", export.layers, export.fingerprint, seed=seed)
        for seed in (41, 42)
    }
    ids, options = SEQUENCES[2], {"max_tokens": 200, "ignore_eos": True, "return_token_ids": True}
    server.load_adapter("moving", folders[41])
    before = server.complete(ids, "moving", **options)["token_ids"]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(server.complete, ids, "moving", **options)
        time.sleep(0.05)
        server.load_adapter("moving", folders[42], replace=True)
        after = server.complete(ids, "moving", **options)["token_ids"]
        assert under_way.result()["token_ids"] in (before, after)  # it may not have begun before
    assert after != before
    server.unload_adapter("moving")


def test_many_requests_while_adapters_come_and_go(
    running: Running, export: Any, write_pairs: Callable[..., pathlib.Path], tmp_path: pathlib.Path
) -> None:
    """The short form of benchmarks/serving_soak.py."""
    soaking = importlib.import_module("serving_soak")
    process, client = running
    spare = {
        f"spare{seed}": write_pairs(tmp_path / f"spare{seed}", export.layers, export.fingerprint, seed=seed)
        for seed in (31, 32, 33)
    }
    plan = soaking.Soak(requests=60, at_once=8, per_round=20, in_round=2, new_tokens=6)
    found = soaking.soak(client, SEQUENCES[:4], ["one", "two"], spare, plan, pid=process.pid)
    assert (found["requests"], found["wrong"], found["failed"]) == (60, [], [])
    assert found["largest_difference"] < 1e-4
    assert found["least_difference_of_adapters"] > 1e-2  # a mixed-up answer would have been seen
    assert found["loads"] > 2
    assert found["unloads"] > 0
    assert len(found["memory_bytes"]) == 4
    assert client.models()[:3] == ["tiny", "one", "two"]


def test_ctrl_c_stops_it_cleanly(running: Running) -> None:
    """The last test of this server."""
    process, client = running
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    await_silence(int(client.url.rpartition(":")[2]))
