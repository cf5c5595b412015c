"""Upload an export to the hub: only one whose certificate holds, and every refusal in one line."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cloq_export.errors import CloqError, FormatError, HubError, UsageError
from cloq_export.files.atomic import is_partial

# Beside what the hub itself leaves out (.git, .cache/huggingface): what belongs to a machine and not to a model.
_LEFT_OUT_NAMES = (
    ".DS_Store",
    ".gitignore",
    "Thumbs.db",
    "desktop.ini",
    "__pycache__",
    ".ipynb_checkpoints",
    ".cache",
    ".git",
)
_LEFT_OUT_SUFFIXES = (".partial", ".lock", ".tmp", ".swp", "~")
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclasses.dataclass(frozen=True)
class HubPlace:
    """Where an export goes on the hub.

    Args:
        repo_id: `owner/name`, or `name` for the owner of the token.
        private: make a new repository private; one that exists keeps what it is.
        token: of the hub; None takes the one that the machine is logged in with.
        revision: branch to put it on, made if it is not there; None is the main branch.
    """

    repo_id: str
    private: bool = False
    token: str | None = None
    revision: str | None = None


@dataclasses.dataclass(frozen=True)
class Pushed:
    """What was uploaded.

    Args:
        repo_id: of the repository, owner included.
        url: of its page.
        commit: page of the commit.
        revision: branch.
        files: names uploaded, sorted.
        bytes: of all of them.
    """

    repo_id: str
    url: str
    commit: str
    revision: str
    files: tuple[str, ...]
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return what `cloq push --json` prints."""
        return {**dataclasses.asdict(self), "files": list(self.files)}


def upload_export(
    folder: str | os.PathLike[str], place: HubPlace, *, verify: Callable[[Path], Any], api: Any = None
) -> Pushed:
    """Upload an export as a model of the hub, after its certificate was repeated on the files as they lie here.

    The repository is made if it is not there; files of the same name are replaced, others are left alone. An upload
    that breaks off goes on where it stopped when it is asked for again.

    Args:
        folder: the export.
        place: where it goes.
        verify: repeats the certificate and raises a `CloqError` if it does not hold; called before anything is sent.
        api: an `HfApi`, or what behaves like one; None makes one.

    Returns:
        What was uploaded.

    Raises:
        FormatError: the folder does not exist or is empty, a file in it is a link, or what `verify` raises.
        UsageError: the repository's name or the revision is not one that the hub takes.
        HubError: no token, no permission, no network, or the hub refuses; the message says which and what to do.
    """
    import huggingface_hub

    folder, repo_id, revision = Path(folder), place.repo_id, place.revision
    if not is_repo_id(repo_id):
        raise UsageError(
            f"{str(repo_id)[:120]!r} is no name of a hub repository; it reads owner/name, with letters, digits, '-', "
            "'_' and '.' only."
        )
    files = _files(folder)
    verify(folder)
    token = place.token or huggingface_hub.get_token()
    if not token:
        raise HubError(f"there is no token for the hub; {_LOGIN}.")
    if api is None:
        api = huggingface_hub.HfApi(token=token, library_name="cloq_export")
    try:
        made = api.create_repo(repo_id, private=place.private, repo_type="model", exist_ok=True, token=token)
        full_id = str(getattr(made, "repo_id", repo_id))
        if revision is not None:
            api.create_branch(full_id, branch=revision, repo_type="model", exist_ok=True, token=token)
        commit = api.upload_folder(
            repo_id=full_id,
            folder_path=folder,
            repo_type="model",
            revision=revision,
            commit_message="Upload an export of cloq_export",
            # Names, not patterns: what was counted here is what is sent.
            allow_patterns=[_literal(name) for name in files],
            token=token,
        )
    except CloqError:
        raise
    except Exception as error:  # the library raises its own, its HTTP client's and the system's errors
        raise _translated(error, repo_id, revision, token) from None
    return Pushed(
        repo_id=full_id,
        url=str(made),
        commit=str(getattr(commit, "commit_url", commit)),
        revision=revision or "main",
        files=tuple(sorted(files)),
        bytes=sum(files.values()),
    )


def is_repo_id(name: Any) -> bool:
    """Return whether a value is `owner/name` or `name` as the hub allows them."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return isinstance(name, str)


def _files(folder: Path) -> dict[str, int]:
    """Return the size of every file that belongs to the export, by its name in the folder."""
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise FormatError(f"{folder} {what}; give the folder of an export, e.g. from cloq export.")
    sizes: dict[str, int] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if is_left_out(name.as_posix()):
            continue
        # A link would publish whatever it leads to.
        if path.is_symlink():
            raise FormatError(f"{path} is a link; only files that lie in the folder are uploaded: put the file there.")
        if path.is_file():
            sizes[name.as_posix()] = path.stat().st_size
    if not sizes:
        raise FormatError(f"{folder} holds no file to upload; give the folder of an export, e.g. from cloq export.")
    return sizes


def is_left_out(name: str) -> bool:
    """Return whether a file of this name in the folder belongs to the machine and is not uploaded."""
    parts = name.split("/")
    return any(is_partial(part) or part in _LEFT_OUT_NAMES or part.endswith(_LEFT_OUT_SUFFIXES) for part in parts)


def _literal(name: str) -> str:
    """Return the pattern that only this name matches."""
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in name)


def _translated(error: Exception, repo_id: str, revision: str | None, token: str) -> CloqError:
    from huggingface_hub import errors as hub_errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, hub_errors.LocalTokenNotFoundError):
        return HubError(f"there is no token for the hub; {_LOGIN}.")
    if isinstance(error, hub_errors.HFValidationError):
        return UsageError(f"the hub's client refuses the names given: {_reason(error, token)}; check them.")
    if isinstance(error, hub_errors.OfflineModeIsEnabled):
        return HubError("the hub is switched off by HF_HUB_OFFLINE; unset it to upload.")
    if status == 401:
        return HubError(f"the hub does not accept the token ({_reason(error, token)}); {_LOGIN}.")
    if status == 403:
        return HubError(
            f"the token may not write to {repo_id} ({_reason(error, token)}); use a token with write access to that "
            "owner, or another owner."
        )
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return HubError(f"{repo_id} has no branch {revision!r} and it cannot be made; check `revision`.")
    if isinstance(error, hub_errors.RepositoryNotFoundError) or status == 404:
        return HubError(f"the hub finds no {repo_id} that this token may see; check the name and the token's owner.")
    if status == 429:
        return HubError("the hub asks to wait (too many requests); run the same command again later: it goes on.")
    if status is not None and status < 500:
        return HubError(f"the hub refuses {repo_id}: {_reason(error, token)}.")
    if status is not None:
        return HubError(f"the hub fails with status {status}; run the same command again later: it goes on.")
    if _is_network(error):
        return HubError(
            f"the hub cannot be reached ({_reason(error, token)}); connect to the network and run the same command "
            "again: it goes on."
        )
    if isinstance(error, OSError) and error.filename:
        return FormatError(f"{error.filename} cannot be read: {error.strerror or error}; check the path.")
    return HubError(f"the upload to {repo_id} failed ({_reason(error, token)}); run the same command again.")


def _is_network(error: BaseException | None) -> bool:
    """Return whether an error, or what caused it, is one of a connection, whatever HTTP client raised it."""
    for _ in range(8):
        if error is None:
            return False
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if isinstance(error, (ConnectionError, TimeoutError)) or kinds & {
            "TransportError",
            "ConnectionError",
            "gaierror",
        }:
            return True
        error = error.__cause__ or error.__context__
    return False


def _reason(error: Exception, token: str) -> str:
    """Return an error's text as one short line, in which the token does not stand."""
    text = str(getattr(error, "server_message", None) or error) or type(error).__name__
    return " ".join(text.replace(token, "***").split())[:200].rstrip(".;:")
