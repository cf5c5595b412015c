"""`cloq serve` as a command: what it proves before it answers, what operators need of it, and how it ends."""

from __future__ import annotations

import json
import pathlib
import re
import signal
import urllib.request
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
from cloq_serve import await_silence, cloq_serve, printed, served

from cloq_export.artifact.probe_record import ProbeRecord
from cloq_export.engines.vllm.access import Access
from cloq_export.engines.vllm.client import ServerClient
from cloq_export.errors import EngineError
from cloq_export.formats.peft import read_adapter, write_adapter
from cloq_export.verbs.recording import note_adapter

pytestmark = pytest.mark.slow

CERTIFICATES = pathlib.Path(__file__).parents[1] / "fixtures" / "certificates"
GENERATOR = torch.Generator().manual_seed(3)
SEQUENCES = [torch.randint(3, 96, (length,), generator=GENERATOR).tolist() for length in (12, 5, 9, 2, 17, 30, 7)]


@pytest.mark.usefixtures("only_on_cpu")
def test_experts_whose_base_needs_its_adapter(mixture: Callable[..., Any], engine_python: str) -> None:
    export = mixture("qwen3-moe")
    config = json.loads((export.folder / "config.json").read_text())
    config["quantization_config"]["cloq"]["needs_adapter"] = True
    (export.folder / "config.json").write_text(json.dumps(config))
    with served(export.folder, export.adapters, engine_python) as (_, client, announced):
        assert client.models() == announced["models"] == ["tiny", "one", "two"]
        assert "the base needs its adapter, so tiny-base is not served" in announced["notes"]
        assert announced["proof"]["modules"] == len(export.layers)
        assert announced["proof"]["effect"] is None
        # Clients at once, on experts with adapters of their own.
        who = ["one", "two"] * len(SEQUENCES)
        sequences = [ids for ids in SEQUENCES for _ in range(2)]
        scores = client.prompt_logprobs(sequences, who)
        expected = [export.logprobs(ids, name) for ids, name in zip(sequences, who, strict=True)]
        assert all(float((one - other).abs().max()) < 1e-3 for one, other in zip(scores, expected, strict=True))
        assert float((expected[0] - export.logprobs(sequences[0], None)).abs().max()) > 0.05
        assert client.generate([SEQUENCES[0]], ["two"], 6) == [export.greedy(SEQUENCES[0], "two", 6)]
        prompt = {"prompt": SEQUENCES[0], "max_tokens": 4, "temperature": 0, "return_token_ids": True}
        for model in ({"model": "tiny"}, {}):
            answer = client._post("/v1/completions", {**model, **prompt})
            assert answer["choices"][0]["token_ids"] == client.generate([SEQUENCES[0]], ["one"], 4)[0]
        refused = r"400.*tiny-base needs its adapter: its codes.*Ask for tiny\."
        with pytest.raises(EngineError, match=refused):
            client._post("/v1/completions", {"model": "tiny-base", **prompt})


def test_killed_it_takes_the_server_with_it(export: Any, engine_python: str) -> None:
    with cloq_serve(
        *(str(export.folder), "--default", "two", "--name", "tiny", "--port", "0", "--python", engine_python),
        *("--threads", "1", "--kv-cache-gib", "1", "--skip-proof", "--", "--max-num-seqs", "4"),
    ) as process:
        text = printed(process)
        assert "the default was not proven" in text
        assert "tiny  (the default: adapter two)" in text
        assert "tiny-base  (the quantized base without an adapter)" in text
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/v1", text)[1])  # type: ignore[index]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{port}/v1/models", timeout=30) as answer:
            assert json.load(answer)["data"][0]["id"] == "tiny"
        process.kill()
        process.communicate(timeout=120)
    # It cannot stop the server, which then ends by itself.
    await_silence(port)


def _recorded(folder: pathlib.Path, export: Any, *, off: float = 0.0) -> pathlib.Path:
    """Write the adapter two with a record of what the model said with it when it was made, or of something else."""
    ids = [SEQUENCES[4], SEQUENCES[5]]
    probe = ProbeRecord.of(torch.float32, ids, [export.logprobs(each, "two") + off for each in ids])
    pairs = read_adapter(export.adapters["two"]).pairs
    noted = note_adapter("recorded", pairs, base_fingerprint=export.fingerprint, probe=probe)
    write_adapter(folder, pairs, base_model="random", base_fingerprint=export.fingerprint, extra=noted)
    return folder


def test_what_operators_need(export: Any, engine_python: str, tmp_path: pathlib.Path) -> None:
    """A key, TLS, health and metrics, a proof before the port opens, and an end that cuts nobody off."""
    key = tmp_path / "key"
    key.write_text("a-secret-of-operators\n")
    with cloq_serve(
        *(str(export.folder), "--name", "tiny", "--port", "0", "--python", engine_python, "--threads", "1"),
        *("--kv-cache-gib", "1", "--dtype", "float32", "--api-key-file", str(key), "--default", "recorded"),
        *("--adapter", f"recorded={_recorded(tmp_path / 'recorded', export)}"),
        *("--ssl-certfile", str(CERTIFICATES / "server.pem"), "--ssl-keyfile", str(CERTIFICATES / "server.key")),
        *("--", "--max-num-seqs", "4"),
    ) as process:
        text = printed(process)
        words = " ".join(text.split())
        assert "proven on 45 tokens before the port opened: the default adapter recorded; the engine holds A" in words
        assert f'-H "Authorization: Bearer $VLLM_API_KEY" --cacert {CERTIFICATES / "server.pem"}' in words
        url = re.search(r"https://127\.0\.0\.1:\d+", text)[0]  # type: ignore[index]
        certificate = CERTIFICATES / "server.pem"
        stranger = ServerClient(url, "tiny-base", [], access=Access(None, certificate))
        assert stranger._http.get("/health").status_code == 200
        assert 'vllm:num_requests_running{engine="0",model_name="tiny-base"}' in stranger._http.get("/metrics").text
        body = {"model": "tiny", "prompt": [5, 6], "max_tokens": 2}
        for method, path, content in (
            ("GET", "/v1/models", None),
            ("POST", "/v1/completions", body),
            ("POST", "/invocations", body),  # vLLM itself answers this one to anybody
            ("GET", "/docs", None),
        ):
            assert stranger._http.request(method, path, json=content).status_code == 401, path
        client = ServerClient(url, "tiny-base", ["one"], access=Access("a-secret-of-operators", certificate))
        assert client.models() == ["tiny", "one", "two", "recorded", "tiny-base"]
        assert client._http.post("/invocations", json=body).status_code == 200
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        assert len(family) > 1
        assert not any("a-secret" in word for each in family for word in each.cmdline())
        # A request under way is finished after SIGTERM.
        asked = {**body, "max_tokens": 200, "ignore_eos": True, "stream": True}
        asked["stream_options"] = {"include_usage": True}
        with client._http.stream("POST", "/v1/completions", json=asked, timeout=120) as answer:
            lines = (line for line in answer.iter_lines() if line)
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            *_, usage, done = [first, *lines]
        assert done == "data: [DONE]"
        assert json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] == 200
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert errors.rstrip().endswith("stopped")
        assert "a-secret" not in text + errors
    await_silence(int(url.rpartition(":")[2]))


def test_a_default_that_is_not_what_was_made_is_not_served(
    export: Any, engine_python: str, tmp_path: pathlib.Path
) -> None:
    folder = _recorded(tmp_path / "recorded", export, off=0.5)
    with cloq_serve(
        *(str(export.folder), "--name", "tiny", "--port", "0", "--python", engine_python, "--threads", "1"),
        *("--kv-cache-gib", "1", "--adapter", f"recorded={folder}", "--default", "recorded"),
    ) as process:
        printed, errors = process.communicate(timeout=600)
    assert process.returncode == 3, errors
    assert printed == ""
    assert re.search(r"error: the port was not opened, because .*; see what `cloq verify` says of it", errors)


def test_the_command_shows_the_last_lines_of_an_engine_that_dies(export: Any, engine_python: str) -> None:
    with cloq_serve(
        *(str(export.folder), "--default", "one", "--port", "0", "--python", engine_python, "--kv-cache-gib", "1"),
        *("--", "--no-such-option"),
    ) as process:
        _, errors = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "unrecognized arguments: --no-such-option" in errors
    assert errors.rstrip().endswith("error: the vLLM server did not start (exit code 2); its last lines stand above.")
