"""Upload an export to the model hub."""

from __future__ import annotations

from pathlib import Path

from cloq_export.artifact.certificate import verify_certificate
from cloq_export.artifact.hub import HubPlace, Pushed, is_left_out, upload_export


def push(
    folder: Path, repo_id: str, *, private: bool = False, token: str | None = None, revision: str | None = None
) -> Pushed:
    """Upload an export to the model hub, after repeating its certificate on the files as they lie here.

    Args:
        folder: an export with a certificate.
        repo_id: `owner/name`.
        private: make a new repository private.
        token: of the hub; None takes the one that the machine is logged in with.
        revision: branch; None is the main one.

    Returns:
        What was uploaded, and where.

    Raises:
        CloqError: the certificate does not hold, or the hub refuses.
    """

    def refuse_uncertified(path: Path) -> None:
        verify_certificate(path, left_out=is_left_out)

    return upload_export(folder, HubPlace(repo_id, private, token, revision), verify=refuse_uncertified)
