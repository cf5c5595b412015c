"""With an API key, a server of `cloq serve` answers nothing without it but what monitors ask.

vLLM asks for the key below some prefixes alone, and other paths of the same server, such as `/invocations`, answer
completions and load adapters too.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

OPEN_PATHS = ("/health", "/ping", "/metrics", "/load", "/version")


def register() -> None:
    """Let vLLM's check of the key stand before every other path."""
    from fastapi.datastructures import Headers
    from fastapi.responses import JSONResponse
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    def call(self: Any, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        asks = scope["type"] in ("http", "websocket") and scope.get("method") != "OPTIONS"
        guarded = asks and not is_open(scope["path"].removeprefix(scope.get("root_path", "")))
        if guarded and not self.verify_token(Headers(scope=scope)):
            return JSONResponse({"error": "Unauthorized"}, status_code=401)(scope, receive, send)
        answered: Awaitable[None] = self.app(scope, receive, send)
        return answered

    AuthenticationMiddleware.__call__ = call


def is_open(path: str) -> bool:
    """Return whether a path is answered without the key."""
    return path in OPEN_PATHS or path.startswith("/metrics/")
