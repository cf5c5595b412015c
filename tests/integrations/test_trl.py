"""Rollouts for TRL from a server that is a stand-in here: what is synced, what goes, and what happens if it is gone."""

from __future__ import annotations

import http.server
import json
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloq_export.engines.vllm.client import ServerClient
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

    def places(self) -> dict[str, str]:
        return {"base": "", **{name: str(folder.resolve()) for name, folder in self.loaded.items()}}

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
        Path(folder).mkdir(parents=True, exist_ok=True)
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
    monkeypatch.setattr(trl, "_PAUSE", 0.02)


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
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["policy-3"]
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
    first = AdapterRollouts(server, tmp_path / "one")  # type: ignore[arg-type]
    first(["a"], trainer(0))
    with pytest.raises(UsageError, match=r"already serves policy-0, perhaps for another trainer; .* another `name`"):
        AdapterRollouts(server, tmp_path / "two")(["a"], trainer(0))  # type: ignore[arg-type]
    AdapterRollouts(server, tmp_path / "two", RolloutOptions("other"))(["a"], trainer(0))  # type: ignore[arg-type]
    assert set(server.loaded) == {"policy-0", "other-0"}
    with pytest.raises(UsageError, match=r"another trainer writes its adapters into .*one; give each a folder and a"):
        AdapterRollouts(server, tmp_path / "one", RolloutOptions("third"))(["a"], trainer(0))  # type: ignore[arg-type]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as vLLM does; `server.refusal` is why it loads no adapter, `server.room` how many it has room for."""

    server: Any

    def do_GET(self) -> None:
        cards = [{"id": "base", "root": "/base"}]
        cards += [{"id": name, "root": place} for name, place in self.server.loaded.items()]
        self._answer(200, {"data": cards})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        loaded = self.server.loaded
        if self.path == "/v1/load_lora_adapter":
            refusal = self.server.refusal or ("no free slot" if len(loaded) >= self.server.room else None)
            if refusal:
                self._answer(400, {"error": {"message": refusal}})
                return
            loaded[asked["lora_name"]] = asked["lora_path"]
            self._answer(200, {})
        elif self.path == "/v1/unload_lora_adapter":
            del loaded[asked["lora_name"]]
            self._answer(200, {})
        elif asked["model"] not in loaded:
            self._answer(404, {"error": {"message": f"there is no {asked['model']}"}})
        else:
            choice = {"token_ids": [4, 2], "logprobs": {"token_logprobs": [-1.0, -0.5]}}
            self._answer(200, {"choices": [choice]})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class Running:
    """A server of this machine that can be ended and started again, and then has forgotten everything."""

    def __init__(self) -> None:
        self.port, self.http = 0, None
        self.start()

    def start(self) -> None:
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self.http.server_address[1]
        self.http.loaded, self.http.refusal, self.http.room = {}, None, 9
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def end(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def running() -> Iterator[Running]:
    server = Running()
    yield server
    server.end()


def rollouts_at(server: Running, folder: Path, **options: Any) -> AdapterRollouts:
    return AdapterRollouts(
        ServerClient(f"http://127.0.0.1:{server.port}", "base", []), folder, RolloutOptions(**options)
    )


def test_a_server_that_ends_and_is_started_again(running: Running, tmp_path: Path) -> None:
    rollouts = rollouts_at(running, tmp_path)
    assert rollouts(["a"], trainer(0))["completion_ids"] == [[4, 2]]
    running.end()
    threading.Timer(0.3, running.start).start()
    assert rollouts(["a"], trainer(1))["logprobs"] == [[-1.0, -0.5]]
    assert list(running.http.loaded) == ["policy-1"]
    running.end()
    threading.Timer(0.3, running.start).start()
    rollouts(["a"], trainer(1))
    assert running.http.loaded == {"policy-1": str(tmp_path / "policy-1")}


def test_a_server_that_is_gone_for_good_leaves_the_last_adapter(running: Running, tmp_path: Path) -> None:
    rollouts = rollouts_at(running, tmp_path, patience=0.05)
    rollouts(["a"], trainer(0))
    running.end()
    with pytest.raises(
        EngineError, match=r"did not come back within 0\.05 seconds .*; the last adapter is in .*policy-0"
    ):
        rollouts(["a"], trainer(1))
    assert (tmp_path / "policy-0" / "adapter").is_file()
    running.start()


def test_a_full_table_of_adapters(running: Running, tmp_path: Path) -> None:
    running.http.room = 1
    rollouts = rollouts_at(running, tmp_path)
    rollouts(["a"], trainer(0))
    rollouts(["a"], trainer(1))
    assert list(running.http.loaded) == ["policy-1"]
    running.http.loaded["other"] = "/other"  # and now ours has no place even alone
    running.http.room = 0
    with pytest.raises(EngineError, match=r"policy-2 was not loaded: .*no free slot; the last adapter .*policy-1\."):
        rollouts(["a"], trainer(2))
    assert (tmp_path / "policy-1" / "adapter").is_file()


@pytest.mark.parametrize(
    "refusal",
    [
        "the adapter belongs to another base: it was made for 1a2b, and this is 3c4d",
        "the adapter has weights for lm_head, which are not served",
    ],
)
def test_an_adapter_that_the_server_does_not_take(running: Running, tmp_path: Path, refusal: str) -> None:
    running.http.refusal = refusal
    with pytest.raises(EngineError, match=rf"policy-0 was not loaded: the server refused \(400\): {refusal}"):
        rollouts_at(running, tmp_path)(["a"], trainer(0))
    assert not running.http.loaded
    assert (tmp_path / "policy-0" / "adapter").is_file()


def test_what_a_killed_training_left_at_the_server_makes_room(running: Running, tmp_path: Path) -> None:
    running.http.loaded["policy-4"] = str(tmp_path / "policy-4")
    rollouts_at(running, tmp_path)(["a"], trainer(4))
    assert running.http.loaded == {"policy-4": str(tmp_path / "policy-4")}
    running.http.loaded["policy-4"] = "/elsewhere/policy-4"
    with pytest.raises(UsageError, match="already serves policy-4, perhaps for another trainer"):
        rollouts_at(running, tmp_path / "own")(["a"], trainer(4))
