"""The key, the certificates and the allowed folders of a server, without any server."""

from __future__ import annotations

import http.server
import json
import pathlib
import ssl
import threading
from typing import Any

import httpx2
import pytest

from cloq_export.engines.vllm import plan as vllm_plan
from cloq_export.engines.vllm.access import Access, Certificates, read_api_key
from cloq_export.engines.vllm.facts import EngineFacts
from cloq_export.engines.vllm.plan import curl_line
from cloq_export.engines.vllm.plugin.adapters import ServingPolicy, allowed_place
from cloq_export.engines.vllm.plugin.api_key import is_open
from cloq_export.errors import UsageError
from cloq_export.verbs.options import ServeOptions
from cloq_export.verbs.serve import Serving, plan_serving

FILES = pathlib.Path(__file__).parents[1] / "fixtures" / "certificates"
CERTIFICATE, KEY = FILES / "server.pem", FILES / "server.key"


@pytest.fixture(autouse=True)
def _no_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setattr(vllm_plan, "engine_facts", lambda python: EngineFacts("0.32.0", cuda=False))


def plan_of(export: Any, **options: Any) -> Any:
    return plan_serving(export.folder, ServeOptions(default="one", port=0, kv_cache_gib=1, **options))


def test_a_deterministic_server_is_told_so(export: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, usual = plan_of(export, deterministic=True), plan_of(export)
    assert plan.environment.items() >= vllm_plan.DETERMINISTIC_ENVIRONMENT.items()
    assert "--enforce-eager" in plan.command
    assert not usual.environment.keys() & vllm_plan.DETERMINISTIC_ENVIRONMENT.keys()
    assert "--enforce-eager" not in usual.command
    monkeypatch.setattr(vllm_plan, "engine_facts", lambda python: EngineFacts("0.32.0", cuda=True))
    with pytest.raises(
        UsageError, match="--deterministic is for engines on a CPU, and this one has CUDA; leave it out"
    ):
        plan_of(export, deterministic=True)


def test_the_key_comes_from_a_file_or_the_environment(
    export: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    assert read_api_key(None) is None
    assert plan_of(export).access.headers() == {}
    monkeypatch.setenv("VLLM_API_KEY", "from-the-environment")
    assert plan_of(export).access.headers() == {"Authorization": "Bearer from-the-environment"}
    file = tmp_path / "key"
    file.write_text("from-a-file\n")
    plan = plan_of(export, api_key_file=file)
    assert plan.environment["VLLM_API_KEY"] == "from-a-file"
    assert not any("from-a-file" in word for word in plan.command)
    assert "from-a-file" not in f"{plan.access!r} {plan.options} {curl_line(plan)}"
    assert '-H "Authorization: Bearer $VLLM_API_KEY"' in curl_line(plan)


@pytest.mark.parametrize("content", ["", "\n", "one\ntwo\n", "with blank", "schlüssel", "a\tb"])
def test_what_is_no_key(content: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "key"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=r"key does not hold one key of printable ASCII characters") as caught:
        read_api_key(file)
    assert content.strip() == "" or content.strip() not in str(caught.value)


def test_a_key_that_cannot_be_read_or_would_be_seen(export: Any, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UsageError, match=r"none cannot be read \(No such file or directory\)"):
        read_api_key(tmp_path / "none")
    for flag in ("--api-key", "--api_key=secret", "--api-k"):
        with pytest.raises(UsageError, match=r"would show the key to everybody .* use --api-key-file") as caught:
            plan_of(export, engine_options=(flag, "secret"))
        assert "secret" not in str(caught.value)


def test_what_monitors_ask_needs_no_key() -> None:
    assert all(map(is_open, ("/health", "/metrics", "/metrics/", "/ping", "/version", "/load")))
    assert not any(map(is_open, ("/", "/v1/models", "/invocations", "/healthy", "/metricsx", "/adapters", "/docs")))


def test_certificates_become_options_of_the_server(export: Any) -> None:
    plan = plan_of(export, ssl_certfile=CERTIFICATE, ssl_keyfile=KEY)
    assert plan.url.startswith("https://127.0.0.1:")
    command = " ".join(plan.command)
    assert f"--ssl-certfile {CERTIFICATE} --ssl-keyfile {KEY}" in command
    assert "--ssl-cert-reqs" not in command
    assert f"--cacert {CERTIFICATE}" in curl_line(plan)
    asking = plan_of(export, ssl_certfile=CERTIFICATE, ssl_keyfile=KEY, ssl_ca_certs=CERTIFICATE)
    # vLLM lets everybody in unless it is told to ask.
    assert f"--ssl-ca-certs {CERTIFICATE} --ssl-cert-reqs 2" in " ".join(asking.command)


def test_certificates_that_do_not_belong_together(tmp_path: pathlib.Path) -> None:
    text = tmp_path / "text"
    text.write_text("no certificate\n")
    for files, message in (
        ((CERTIFICATE, None, None), "give both `ssl_certfile` and `ssl_keyfile`"),
        ((None, None, CERTIFICATE), "give both `ssl_certfile` and `ssl_keyfile`"),
        ((CERTIFICATE, FILES / "other.key", None), r"are no certificate with its key .*\(key values mismatch\)"),
        ((text, KEY, None), "are no certificate with its key in PEM form"),
        ((CERTIFICATE, FILES / "encrypted.key", None), "encrypted.key is encrypted, and vLLM asks for no password"),
        ((CERTIFICATE, tmp_path / "none", None), r"none cannot be read \(No such file or directory\)"),
        ((CERTIFICATE, KEY, text), "holds no certificates in PEM form"),
    ):
        with pytest.raises(UsageError, match=message):
            Certificates.of(*files)
    assert Certificates.of(None, None, None) is None


@pytest.mark.parametrize("around", ["friendlyName: Zoë\n".encode(), "friendlyName: Zoë\n".encode("latin-1"), b""])
def test_a_certificate_may_stand_among_other_things(tmp_path: pathlib.Path, around: bytes) -> None:
    """As `openssl pkcs12 -nodes` writes it: names in some encoding, and the key before the certificate."""
    both = tmp_path / "both.pem"
    both.write_bytes(around + KEY.read_bytes() + around + CERTIFICATE.read_bytes())
    certificates = Certificates.of(both, both, None)
    assert certificates is not None
    trusted = Access(None, certificates.certfile).trust()
    assert isinstance(trusted, ssl.SSLContext)
    assert trusted.cert_store_stats()["x509"] == 1


def test_a_client_trusts_one_certificate_alone(tmp_path: pathlib.Path) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE, KEY)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"https://127.0.0.1:{server.server_port}/none"
    try:
        with httpx2.Client(verify=Access(None, CERTIFICATE).trust(), trust_env=False) as client:
            assert client.get(url).status_code == 404
        with httpx2.Client(verify=Access().trust(), trust_env=False) as client, pytest.raises(httpx2.ConnectError):
            client.get(url)
    finally:
        server.shutdown()
        server.server_close()


def test_adapters_come_from_allowed_folders_alone(export: Any, tmp_path: pathlib.Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    for folder in (root / "good", other / "bad"):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    (root / "out").symlink_to(other / "bad")
    (root / "in").symlink_to(root / "good")
    (root / "leaky").mkdir()
    (root / "leaky" / "adapter_model.safetensors").symlink_to(other / "bad" / "adapter_config.json")
    (root / "round").symlink_to(root / "round")
    link = tmp_path / "link"
    link.symlink_to(root)
    for spelled in (root / "good", root / "in", link / "good", root / "x" / ".." / "good"):
        assert allowed_place(spelled, [link]) == root / "good"
    assert allowed_place(root / "none", [root]) == root / "none"  # told of by whoever reads it
    for spelled in (root / "out", root / ".." / "other" / "bad", other / "bad", root / "leaky", tmp_path, "/"):
        message = rf"lies in no folder that adapters may be loaded from .* \(allowed: {root}\); start the server with"
        with pytest.raises(UsageError, match=message):
            allowed_place(pathlib.Path(spelled), [root])
    with pytest.raises(UsageError, match=r"round (cannot be followed|lies in no folder)"):
        allowed_place(root / "round", [other])
    with pytest.raises(UsageError, match=r"\(allowed: none\)"):
        allowed_place(root / "good", [])
    # What a server starts with can be loaded anew.
    plan = plan_of(export, adapter_roots=(str(link),))
    policy = ServingPolicy(**json.loads(plan.environment["CLOQ_EXPORT_VLLM_POLICY"]))
    assert policy.adapter_roots == [str(folder) for folder in (*export.adapters.values(), root)]
    with pytest.raises(UsageError, match="none is no folder, so no adapter can be loaded from there"):
        plan_of(export, adapter_roots=(str(tmp_path / "none"),))


def test_beginnings_of_options_that_are_set_here(export: Any) -> None:
    for flag, message in (
        ("--ssl-certf", "use --ssl-certfile before the --"),
        ("--shutdown", "use --shutdown-timeout before the --"),
        ("--trus", "runs Python code that comes with a model"),
        ("--uds", "use --host and --port before the --"),
        ("--config", "names a file of options, which are not checked there"),
    ):
        with pytest.raises(UsageError, match=message):
            plan_of(export, engine_options=(flag, "x"))
    plan_of(export, engine_options=("--max-num-seqs", "4", "--config-format", "hf"))


def test_strangers_are_told_of(export: Any, tmp_path: pathlib.Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret")
    files = {"ssl_certfile": CERTIFICATE, "ssl_keyfile": KEY}
    for options, open_to_all in (
        ({}, False),
        ({"host": "localhost"}, False),
        ({"host": "0.0.0.0"}, True),
        ({"host": "0.0.0.0", **files}, True),
        ({"host": "0.0.0.0", "api_key_file": key}, False),
        ({"host": "0.0.0.0", "ssl_ca_certs": CERTIFICATE, **files}, False),
    ):
        plan = plan_of(export, **options)
        assert plan.lets_strangers_in == open_to_all, options
        said = any(
            "may ask this server: `api_key_file` sets a key" in note for note in Serving.of(plan, None, []).notes
        )
        assert said == open_to_all
