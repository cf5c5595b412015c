"""How engines and servers that hang, die or refuse are told of, with programs that stand in for vLLM."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import socket
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from cloq_export.engines.vllm import plan as vllm_plan
from cloq_export.engines.vllm.client import ServerClient
from cloq_export.engines.vllm.closed_server import ClosedServer
from cloq_export.engines.vllm.engine import EngineStart, VllmModel
from cloq_export.engines.vllm.facts import EngineFacts
from cloq_export.engines.vllm.options import EngineSettings
from cloq_export.engines.vllm.plan import ServerPlan
from cloq_export.engines.vllm.server import VllmServer
from cloq_export.errors import EngineError, GateMissedError, UsageError
from cloq_export.verbs.options import ServeOptions
from cloq_export.verbs.serve import plan_serving, serve


def stand_in(path: pathlib.Path, body: str) -> pathlib.Path:
    """Write an interpreter that ignores what it is told to run; `asked` and `answered` are its pipes."""
    path.write_text(
        f"#!{sys.executable}\nimport os, sys, time\n"
        "asked, answered = os.fdopen(int(sys.argv[-2])), os.fdopen(int(sys.argv[-1]), 'w')\n"
        f"{body}\n",
        encoding="utf-8",
    )
    path.chmod(0o755)
    return path


READY = 'asked.readline(); print(\'{"result": "ready"}\', file=answered, flush=True); asked.readline()'


def test_an_engine_that_gives_no_answer_is_stopped(export: Any, tmp_path: pathlib.Path) -> None:
    python = stand_in(tmp_path / "python", f"{READY}; time.sleep(60)")
    with VllmModel(export.folder, {}, EngineSettings(), EngineStart(python=python, timeout=120)) as model:
        model.timeout = 1
        with pytest.raises(EngineError, match=r"gave no answer within 1 seconds and was stopped .*last lines:"):
            model.generate([[1]], [None], 1)
        assert model._process.exit_code is not None


@pytest.mark.parametrize("end", ["sys.exit(0)", "time.sleep(60)"], ids=["ends", "is ended"])
def test_what_an_engine_leaves_among_temporary_files_goes_with_it(
    export: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    (tmp_path / "all").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "all"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # torch sets it, once it has compiled something
    leaves = "open(os.environ['TMPDIR'] + '/left', 'w'); print(os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    python = stand_in(tmp_path / "python", f"{leaves}; {READY}; {end}")
    with VllmModel(export.folder, {}, EngineSettings(), EngineStart(python=python, timeout=120)) as model:
        assert [path.name for path in (tmp_path / "all").glob("cloq-*/*")] == ["left"]
        # What is compiled stays where the next engine finds it.
        assert model._process.last_lines().startswith(str(tmp_path / "all" / "torchinductor_"))
    assert list((tmp_path / "all").iterdir()) == []


def test_an_engine_that_dies_is_told_of_with_its_last_lines(export: Any, tmp_path: pathlib.Path) -> None:
    python = stand_in(tmp_path / "python", f"{READY}; print('out of memory'); sys.exit(7)")
    with VllmModel(export.folder, {}, EngineSettings(), EngineStart(python=python, timeout=120)) as model:
        with pytest.raises(EngineError, match=r"ended without an answer \(exit code 7\); its last lines:\nout of mem"):
            model.generate([[1]], [None], 1)
        with pytest.raises(EngineError, match="ended without an answer"):  # and no hang afterwards
            model.prompt_logprobs([[1, 2]], [None])


@pytest.fixture
def plan(export: Any, monkeypatch: pytest.MonkeyPatch) -> ServerPlan:
    monkeypatch.setattr(vllm_plan, "engine_facts", lambda python: EngineFacts("0.32.0", cuda=False))
    return plan_serving(export.folder, ServeOptions(default="one", port=0, kv_cache_gib=1))


def program(plan: ServerPlan, code: str) -> ServerPlan:
    return dataclasses.replace(plan, command=(sys.executable, "-c", code))


def test_a_server_that_is_never_ready_is_stopped(plan: ServerPlan) -> None:
    with pytest.raises(EngineError, match=r"was not ready within 1 seconds and was stopped; its last lines:"):
        VllmServer(program(plan, "import time; time.sleep(60)"), timeout=1)


def test_a_server_that_dies_at_its_start_shows_its_last_lines(plan: ServerPlan) -> None:
    with pytest.raises(EngineError, match=r"did not start \(exit code 3\); its last lines:\nno such device"):
        VllmServer(program(plan, "print('no such device'); raise SystemExit(3)"), timeout=120)


TRACEBACK = """
import sys
print("(EngineCore pid=7) Traceback (most recent call last):")
print("(EngineCore pid=7) ERROR cloq_export.errors.EngineError: vLLM 0.32.9 has no vllm.x, which the plugin builds on.")
print("\\n".join(f"line {number} of what came of it" for number in range(100)))
print("RuntimeError: Engine core initialization failed.")
sys.exit(1)
"""


def test_what_the_plugin_refuses_is_one_line(plan: ServerPlan, export: Any, tmp_path: pathlib.Path) -> None:
    """Whatever process of vLLM it was said in, and however much came after."""
    said = r"\(exit code 1\): vLLM 0\.32\.9 has no vllm\.x, which the plugin builds on\.$"
    with pytest.raises(EngineError, match=rf"^the vLLM server did not start {said}"):
        VllmServer(program(plan, TRACEBACK), timeout=120)
    python = stand_in(tmp_path / "python", TRACEBACK)
    with pytest.raises(EngineError, match=rf"^the vLLM engine did not start {said}"):
        VllmModel(export.folder, {}, EngineSettings(), EngineStart(python=python, timeout=120))


HEALTHY = """
import http.server, os, socket, sys, time
door = socket.socket(fileno=int(os.environ["CLOQ_EXPORT_VLLM_DOOR"])).makefile("rw")
door.write('{"result": "loaded"}\\n')
door.flush()
while True:
    if '"open"' in door.readline():
        break
    door.write('{"result": [[-1.0]]}\\n')
    door.flush()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        if self.path == "/v1/models":
            self.wfile.write(b'{"data": [{"id": "tiny"}]}')
            stop()
    def do_POST(self):
        time.sleep(60)
    def log_message(self, *_):
        pass
def stop():
    if sys.argv[2:]:
        print("the device is lost", flush=True)
        os._exit(9)
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
door.write('{"result": []}\\n')
door.close()
server.serve_forever()
"""


def healthy(plan: ServerPlan, *more: str) -> ServerPlan:
    return dataclasses.replace(plan, command=(sys.executable, "-c", HEALTHY, str(plan.port), *more))


def test_an_answer_that_does_not_come_is_given_up(plan: ServerPlan) -> None:
    with VllmServer(healthy(plan), timeout=120) as server:
        server.timeout = 0.5
        with pytest.raises(EngineError, match=r"did not answer \(timed out\) and runs; its last lines"):
            server.generate([[1]], ["one"], 1)
        client = ServerClient(server.url, server.base_name, ["one"])
        assert client.models() == ["tiny"]
        client.timeout = 0.5
        with pytest.raises(EngineError, match=r"did not answer \(timed out\); see whether it still runs"):
            client.generate([[1]], ["one"], 1)


def test_a_server_that_ends_while_it_serves_is_told_of(
    plan: ServerPlan, export: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloq_export.verbs.serve.plan_serving", lambda *_: healthy(plan, "dies"))
    with pytest.raises(
        EngineError, match=r"ended by itself \(exit code 9\); its last lines:\nthe device is lost|did not"
    ):
        serve(
            export.folder,
            ServeOptions(skip_proof=True),
            announce=lambda served: ServerClient(served.url, served.base_name, []).models(),
        )


def test_what_is_not_proven_ends_the_server_before_its_port_opens(plan: ServerPlan) -> None:
    def prove(closed: ClosedServer) -> None:
        assert closed.prompt_logprobs([[1, 2]], ["one"])[0].tolist() == [-1.0]
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", plan.port)) != 0
        with pytest.raises(UsageError, match="there is no adapter 'three'; there are one, two"):
            closed.held_adapter("three")
        raise GateMissedError("it computes something else")

    before = set(psutil.Process().children())
    with pytest.raises(GateMissedError, match="it computes something else"):
        VllmServer(healthy(plan), timeout=120, prove=prove)
    assert set(psutil.Process().children()) == before


def test_a_server_that_dies_while_it_is_proven_shows_its_last_lines(plan: ServerPlan) -> None:
    answers = """door.write('{"result": [[-1.0]]}\\n')"""
    code = HEALTHY.replace(answers, "print('no memory', flush=True); os._exit(4)")
    assert code != HEALTHY
    dying = dataclasses.replace(plan, command=(sys.executable, "-c", code, str(plan.port)))
    with pytest.raises(EngineError, match=r"did not start \(exit code 4\); its last lines:\nno memory"):
        VllmServer(dying, timeout=120, prove=lambda closed: closed.prompt_logprobs([[1, 2]], ["one"]))


@contextlib.contextmanager
def _listening() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def test_a_client_of_nothing() -> None:
    with _listening() as port:
        client = ServerClient(f"http://127.0.0.1:{port}", "base", [], timeout=5)
        assert not client.is_ready()
        with pytest.raises(EngineError, match="Connection refused"):
            client.models()
