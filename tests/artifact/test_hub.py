"""Uploading: nothing without a certificate, nothing that is not of the export, and every refusal in one line."""

from __future__ import annotations

import http.server
import json
import pathlib
import threading
import types

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from cloq_export.artifact.hub import HubPlace, upload_export
from cloq_export.errors import BindingError, CloqError, FormatError, HubError, UsageError

TOKEN = "hf_secret"


class FakeApi:
    """Stands in for HfApi: applies the patterns as the library does and remembers what it was asked."""

    def __init__(self, failing: dict[str, Exception] | None = None) -> None:
        self.calls: list[tuple[str, dict]] = []
        self.uploaded: list[str] = []
        self._failing = failing or {}

    def _call(self, name, **arguments):
        self.calls.append((name, arguments))
        if name in self._failing:
            raise self._failing[name]

    def create_repo(self, repo_id, **arguments):
        self._call("create_repo", repo_id=repo_id, **arguments)
        owned = repo_id if "/" in repo_id else f"me/{repo_id}"
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{owned}")

    def create_branch(self, repo_id, **arguments):
        self._call("create_branch", repo_id=repo_id, **arguments)

    def upload_folder(self, **arguments):
        self._call("upload_folder", **arguments)
        folder = pathlib.Path(arguments["folder_path"])
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        kept = huggingface_hub.utils.filter_repo_objects(names, allow_patterns=arguments["allow_patterns"])
        self.uploaded = list(kept)
        return types.SimpleNamespace(commit_url=f"https://huggingface.co/{arguments['repo_id']}/commit/1")


@pytest.fixture
def export(tmp_path):
    folder = tmp_path / "export"
    (folder / "adapters" / "cloq").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "README.md", "adapters/cloq/adapter_config.json", "odd[1]*.txt"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture(autouse=True)
def no_token_of_this_machine(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)


def accept(folder):
    assert folder.is_dir()


def refused(folder, api, repo_id="me/model", error=HubError, **options):
    with pytest.raises(error) as caught:
        upload_export(folder, HubPlace(repo_id, token=TOKEN, **options), verify=accept, api=api)
    assert type(caught.value) is error
    text = str(caught.value)
    assert "\n" not in text
    assert TOKEN not in text
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return text


def http_error(kind, status, message="", server_message=None):
    response = types.SimpleNamespace(status_code=status, headers={}, request=None, url="https://huggingface.co")
    return kind(message, response=response, server_message=server_message)


def test_an_export_is_uploaded_whole_and_nothing_else(export):
    for name in (".model.safetensors.0a1b2c3d.partial", ".DS_Store", "run.lock", "notes.txt~", "x.tmp"):
        (export / name).write_text("mine")
    (export / "__pycache__").mkdir()
    (export / "__pycache__" / "x.pyc").write_text("mine")
    (export / "odd1x.txt~").write_text("mine")
    api = FakeApi()
    done = upload_export(export, HubPlace("me/model", private=True, token=TOKEN), verify=accept, api=api)
    expected = ["README.md", "adapters/cloq/adapter_config.json", "config.json", "model.safetensors", "odd[1]*.txt"]
    assert api.uploaded == list(done.files) == expected
    assert done.bytes == sum(len(name) for name in expected)
    assert (done.repo_id, done.revision) == ("me/model", "main")
    assert done.url == "https://huggingface.co/me/model"
    assert done.commit == "https://huggingface.co/me/model/commit/1"
    assert json.loads(json.dumps(done.to_json())) == done.to_json()
    (create, arguments), (upload, _) = api.calls
    assert (create, upload) == ("create_repo", "upload_folder")
    assert arguments == {
        "repo_id": "me/model",
        "private": True,
        "repo_type": "model",
        "exist_ok": True,
        "token": TOKEN,
    }


def test_a_branch_is_made_and_a_short_name_is_completed(export):
    api = FakeApi()
    done = upload_export(export, HubPlace("model", token=TOKEN, revision="int2"), verify=accept, api=api)
    assert (done.repo_id, done.revision) == ("me/model", "int2")
    assert [name for name, _ in api.calls] == ["create_repo", "create_branch", "upload_folder"]
    assert api.calls[1][1]["branch"] == api.calls[2][1]["revision"] == "int2"
    assert api.calls[2][1]["repo_id"] == "me/model"


def test_an_export_without_a_certificate_is_not_uploaded(export):
    api = FakeApi()

    def verify(folder):
        raise BindingError(f"{folder} has no certificate")

    with pytest.raises(BindingError, match="has no certificate"):
        upload_export(export, HubPlace("me/model", token=TOKEN), verify=verify, api=api)
    assert api.calls == []


@pytest.mark.parametrize("repo_id", ["a/b/c", "me/mo del", "", "../model", "me/model.git", "me--x/y", "a" * 200, 7])
def test_a_name_that_is_none_is_refused_before_anything(export, repo_id):
    api = FakeApi()
    assert "is no name of a hub repository; it reads owner/name" in refused(export, api, repo_id, UsageError)
    assert api.calls == []


def test_no_token(export):
    with pytest.raises(HubError, match="there is no token for the hub; log in with `hf auth login`, or set HF_TOKEN"):
        upload_export(export, HubPlace("me/model"), verify=accept, api=FakeApi())
    missing = FakeApi({"create_repo": hub_errors.LocalTokenNotFoundError("Token is required\nbut none found")})
    assert "there is no token for the hub" in refused(export, missing)


def test_folders_that_are_no_export(tmp_path, export):
    api = FakeApi()
    assert "does not exist; give the folder of an export" in refused(tmp_path / "none", api, error=FormatError)
    assert "is not a folder" in refused(export / "config.json", api, error=FormatError)
    (tmp_path / "empty").mkdir()
    assert "holds no file to upload" in refused(tmp_path / "empty", api, error=FormatError)
    (export / "passwd").symlink_to("/etc/passwd")
    assert "passwd is a link; only files that lie in the folder" in refused(export, api, error=FormatError)
    (export / "passwd").unlink()
    (export / "elsewhere").symlink_to(tmp_path)
    assert "elsewhere is a link" in refused(export, api, error=FormatError)
    assert api.calls == []


HTTP = hub_errors.HfHubHTTPError
MISSING = hub_errors.RepositoryNotFoundError


@pytest.mark.parametrize("step", ["create_repo", "upload_folder"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(HTTP, 401, "401 Client Error\nInvalid token hf_secret"), "the hub does not accept the token"),
        (http_error(MISSING, 401, "Repository Not Found\nPlease make sure"), "the hub does not accept the token"),
        (http_error(HTTP, 403, "403", "You don't have the rights"), r"may not write to me/model \(You don't have the"),
        (http_error(MISSING, 404, "404"), "the hub finds no me/model that this token may see"),
        (http_error(HTTP, 429, "429"), "the hub asks to wait"),
        (
            http_error(HTTP, 400, "400", "Invalid metadata in README.md."),
            "refuses me/model: Invalid metadata in README",
        ),
        (http_error(HTTP, 503, "503 Server Error\nfor url"), "the hub fails with status 503; run the same command"),
        (hub_errors.OfflineModeIsEnabled("offline"), "the hub is switched off by HF_HUB_OFFLINE"),
        (hub_errors.HFValidationError("Repo id must\nbe"), "the hub's client refuses the names given: Repo id must be"),
        (ConnectionError("refused"), r"the hub cannot be reached \(refused\); connect to the network"),
        (TimeoutError(), r"the hub cannot be reached \(TimeoutError\)"),
        (FileNotFoundError(2, "No such file", "config.json"), r"config\.json cannot be read: No such file"),
        (RuntimeError("hf_secret\nwas lost"), r"the upload to me/model failed \(\*\*\* was lost\)"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line(export, step, error, message):
    import re

    kind = {hub_errors.HFValidationError: UsageError, FileNotFoundError: FormatError}.get(type(error), HubError)
    assert re.search(message, refused(export, FakeApi({step: error}), error=kind))


def test_a_branch_that_cannot_be_made(export):
    api = FakeApi({"create_branch": http_error(hub_errors.RevisionNotFoundError, 404, "404")})
    assert "me/model has no branch 'v2' and it cannot be made" in refused(export, api, revision="v2")


def test_errors_of_an_http_client_whatever_its_name(export):
    class TransportError(Exception):
        pass

    class ConnectError(TransportError):
        pass

    assert "cannot be reached" in refused(export, FakeApi({"upload_folder": ConnectError("no route")}))
    wrapped = ValueError("could not upload")
    wrapped.__cause__ = ConnectError("no route")
    assert "cannot be reached" in refused(export, FakeApi({"upload_folder": wrapped}))


@pytest.fixture
def serve():
    """Give a function that answers every request of the real client with one status, on this machine."""
    servers = []

    def start(status):
        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self):
                self.rfile.read(int(self.headers.get("content-length") or 0))
                body = b'{"error": "said by the server"}'
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_HEAD = answer

            def log_message(self, *_):
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return huggingface_hub.HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token=TOKEN)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "the hub does not accept the token"),
        (403, "the token may not write to me/model"),
        (400, "the hub refuses me/model: said by the server"),
        (503, "the hub fails with status 503"),
    ],
)
def test_the_real_client_and_a_server_that_refuses(export, serve, status, message):
    assert message in refused(export, serve(status))


def test_the_real_client_without_a_network(export):
    # Nothing listens there.
    api = huggingface_hub.HfApi(endpoint="http://127.0.0.1:9", token=TOKEN)
    assert "the hub cannot be reached" in refused(export, api)


def test_one_family_of_errors():
    assert issubclass(HubError, CloqError)
    assert HubError.exit_code == 1
