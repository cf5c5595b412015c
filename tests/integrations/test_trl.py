"""Rollouts for TRL from a server that is a stand-in here: what is synced, what goes, and what happens if it is gone."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest

from cloq_export.errors import EngineError, GateMissedError, UsageError
from cloq_export.integrations import trl
from cloq_export.integrations.trl import AdapterRollouts, RolloutOptions


class Server:
    """Serves what was loaded, and notes what is asked of it; while `gone` is above zero it is not there."""

    url = "http://stand-in"

    def __init__(self) -> None:
        self.loaded: dict[str, Path] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.log: list[str] = []
        self.gone = 0
        self.forgets = False

    def is_ready(self) -> bool:
        self.gone = max(0, self.gone - 1)
        if not self.gone and self.forgets:
            self.loaded, self.forgets = {}, False
        return not self.gone

    def models(self) -> list[str]:
        return ["base", *self.loaded]

    def load_adapter(self, name: str, folder: Path) -> None:
        if self.gone:
            raise EngineError("the server did not answer")
        assert (Path(folder) / "adapter").is_file()
        self.loaded[name] = Path(folder)
        self.log.append(f"load {name}")

    def unload_adapter(self, name: str) -> None:
        del self.loaded[name]
        self.log.append(f"unload {name}")

    def complete(self, prompt: list[int], adapter: str, **options: Any) -> dict[str, Any]:
        if self.gone:
            raise EngineError("the server did not answer")
        if adapter not in self.loaded:
            raise EngineError(f"the server refused (404): there is no {adapter}")
        self.asked.append((adapter, options))
        return {"token_ids": [*prompt, 2], "logprobs": {"token_logprobs": [-0.5] * (len(prompt) + 1)}}


class Model:
    def save_pretrained(self, folder: Path) -> None:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "adapter").write_text("")


class Tokenizer:
    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}

    def apply_chat_template(self, messages: Any, **options: Any) -> dict[str, list[int]]:
        assert options == {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        return {"input_ids": [90, *self(messages[0]["content"])["input_ids"]]}


def trainer(step: int = 0, top_k: int = 0) -> Any:
    accelerator = types.SimpleNamespace(
        is_main_process=True, unwrap_model=lambda model: model, wait_for_everyone=lambda: None
    )
    args = types.SimpleNamespace(max_completion_length=7, temperature=0.9, top_p=0.8, top_k=top_k)
    state = types.SimpleNamespace(global_step=step)
    return types.SimpleNamespace(
        accelerator=accelerator, args=args, state=state, model=Model(), processing_class=Tokenizer()
    )


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl, "_PAUSE", 0.0)


def test_each_step_has_a_name_of_its_own_and_the_one_before_goes(tmp_path: Path) -> None:
    server = Server()
    rollouts = AdapterRollouts(server, tmp_path)  # type: ignore[arg-type]
    assert rollouts.served_as is None
    found = rollouts(["a bb", "ccc"], trainer(0))
    assert found == {
        "prompt_ids": [[1, 2], [3]],
        "completion_ids": [[1, 2, 2], [3, 2]],
        "logprobs": [[-0.5] * 3, [-0.5] * 2],
    }
    rollouts(["a"], trainer(0))
    assert server.log == ["load policy-0"]  # once a step
    rollouts([[{"role": "user", "content": "dddd"}]], trainer(3, top_k=5))
    assert server.log == ["load policy-0", "load policy-3", "unload policy-0"]
    assert rollouts.served_as == "policy-3"
    assert [path.name for path in tmp_path.iterdir()] == ["policy-3"]
    assert [adapter for adapter, _ in server.asked] == ["policy-0"] * 3 + ["policy-3"]
    wanted = {"max_tokens": 7, "temperature": 0.9, "top_p": 0.8, "logprobs": 0, "return_token_ids": True}
    assert server.asked[3][1] == {**wanted, "top_k": 5, "seed": 3}
    assert sorted(options["seed"] for _, options in server.asked) == [0, 1, 2, 3]  # no two samples share one


def test_a_canary_ends_the_training_and_the_adapter_before_stays(tmp_path: Path) -> None:
    class Canary:
        def check(self, step: int, adapter: str) -> None:
            if step:
                raise GateMissedError(f"step {step}: {adapter} differs")

    server = Server()
    rollouts = AdapterRollouts(server, tmp_path, canary=Canary())  # type: ignore[arg-type]
    rollouts(["a"], trainer(0))
    with pytest.raises(GateMissedError, match="step 1: policy-1 differs"):
        rollouts(["a"], trainer(1))
    assert set(server.loaded) == {"policy-0", "policy-1"}
    assert (tmp_path / "policy-0" / "adapter").is_file()


def test_a_server_that_comes_back_gets_the_adapter_again(tmp_path: Path) -> None:
    server = Server()
    rollouts = AdapterRollouts(server, tmp_path)  # type: ignore[arg-type]
    rollouts(["a"], trainer(0))
    server.gone, server.forgets = 4, True
    assert rollouts(["a"], trainer(0))["completion_ids"] == [[1, 2]]
    assert server.log == ["load policy-0", "load policy-0"]


def test_a_server_that_stays_away_and_one_that_refuses(tmp_path: Path) -> None:
    server = Server()
    rollouts = AdapterRollouts(server, tmp_path, RolloutOptions(patience=0.0))  # type: ignore[arg-type]
    rollouts(["a"], trainer(0))
    server.gone = 10**9
    message = r"http://stand-in did not come back within 0 seconds .*; the last adapter is in .*policy-0"
    with pytest.raises(EngineError, match=message):
        rollouts(["a"], trainer(0))
    server.gone = 0
    server.complete = lambda *_, **__: (_ for _ in ()).throw(EngineError("the prompt is too long"))  # type: ignore
    with pytest.raises(EngineError, match="the prompt is too long"):
        rollouts(["a"], trainer(0))


def test_two_trainers_need_two_names(tmp_path: Path) -> None:
    server = Server()
    AdapterRollouts(server, tmp_path / "one")(["a"], trainer(0))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"already serves policy-0, perhaps for another trainer; .* another `name`"):
        AdapterRollouts(server, tmp_path / "two")(["a"], trainer(0))  # type: ignore[arg-type]
    AdapterRollouts(server, tmp_path / "two", RolloutOptions("other"))(["a"], trainer(0))  # type: ignore[arg-type]
    assert set(server.loaded) == {"policy-0", "other-0"}
