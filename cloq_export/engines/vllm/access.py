"""Who may ask a server and how its clients know it: API key and certificates."""

from __future__ import annotations

import dataclasses
import os
import ssl
from pathlib import Path

from cloq_export.errors import UsageError
from cloq_export.files.spelled_paths import expand_user

API_KEY_VARIABLE = "VLLM_API_KEY"
"""Environment variable from which vLLM's server takes its key; a process list does not show it."""

_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


@dataclasses.dataclass(frozen=True)
class Access:
    """What a server asks of its clients, and what they trust.

    Args:
        api_key: that every request carries; None if the server asks for none.
        certificate: file whose first certificate is the server's own, which alone is trusted; None trusts what the
            system trusts.
    """

    api_key: str | None = dataclasses.field(default=None, repr=False)
    certificate: Path | None = None

    def headers(self) -> dict[str, str]:
        """Return the headers of a request."""
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}

    def trust(self) -> ssl.SSLContext | bool:
        """Return what a client takes the server by."""
        if self.certificate is None:
            return True
        # Tools write names in any encoding around a certificate, and some the key before it.
        _, _, behind = self.certificate.read_text(encoding="latin-1").partition(_BEGIN)
        first, _, _ = behind.partition(_END)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # Exactly this certificate, whatever name or address it was made for, and whoever signed it.
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.load_verify_locations(cadata=_BEGIN + first + _END + "\n")
        return context


@dataclasses.dataclass(frozen=True)
class Certificates:
    """The files that a server encrypts with.

    Args:
        certfile: its certificate and those that lead to a known one, PEM.
        keyfile: the key of its certificate, PEM, not encrypted.
        ca_certs: certificates of which one must have signed each client's; None asks clients for none.
    """

    certfile: Path
    keyfile: Path
    ca_certs: Path | None = None

    @classmethod
    def of(cls, certfile: Path | None, keyfile: Path | None, ca_certs: Path | None) -> Certificates | None:
        """Return the files after reading them, or None if none is named.

        Raises:
            UsageError: one lacks, cannot be read, or does not belong to the others.
        """
        if certfile is None or keyfile is None:
            if (certfile, keyfile, ca_certs) != (None, None, None):
                raise UsageError("TLS takes a certificate and its key; give both `ssl_certfile` and `ssl_keyfile`.")
            return None
        certfile, keyfile = expand_user(certfile).resolve(), expand_user(keyfile).resolve()
        ca_certs = None if ca_certs is None else expand_user(ca_certs).resolve()
        for file in filter(None, (certfile, keyfile, ca_certs)):
            _require_readable(file)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

        def password() -> str:
            raise UsageError(f"{keyfile} is encrypted, and vLLM asks for no password; give a key without one.")

        try:
            context.load_cert_chain(certfile, keyfile, password)
        except ssl.SSLError as error:
            raise UsageError(
                f"{certfile} and {keyfile} are no certificate with its key in PEM form ({_reason(error)})."
            ) from None
        if ca_certs is not None:
            try:
                context.load_verify_locations(ca_certs)
            except ssl.SSLError as error:
                raise UsageError(f"{ca_certs} holds no certificates in PEM form ({_reason(error)}).") from None
        return cls(certfile, keyfile, ca_certs)

    def options(self) -> dict[str, str | int]:
        """Return the options of vLLM's server."""
        told: dict[str, str | int] = {"ssl_certfile": str(self.certfile), "ssl_keyfile": str(self.keyfile)}
        if self.ca_certs is not None:
            # Unless it is told so, vLLM reads the file and lets everybody in.
            told |= {"ssl_ca_certs": str(self.ca_certs), "ssl_cert_reqs": int(ssl.CERT_REQUIRED)}
        return told


def read_api_key(file: Path | None) -> str | None:
    """Return the key that a server asks for.

    Args:
        file: that holds it, with or without a line end; None takes the environment's.

    Returns:
        The key, or None if there is none.

    Raises:
        UsageError: the file cannot be read, or does not hold one key; the message never shows it.
    """
    if file is None:
        source, key = f"the variable {API_KEY_VARIABLE}", os.environ.get(API_KEY_VARIABLE) or None
    else:
        place = expand_user(file)
        _require_readable(place)
        source, key = str(place), place.read_bytes().decode("latin-1").strip()
    if key is not None and not (key.isascii() and key.isprintable() and key and " " not in key):
        raise UsageError(f"{source} does not hold one key of printable ASCII characters without blanks.")
    return key


def _require_readable(file: Path) -> None:
    try:
        with file.open("rb"):
            pass
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror}).") from None


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "unknown").lower().replace("_", " ")
