"""What a page answers to: its own paths, asked under its own names."""

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from page.settings import LOCAL_HOSTS

PREFIX = "/gradio_api/"
# All that a browser asks for. Not among them: files, uploads, proxies, the API's documentation and calls by name.
PATHS = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt")
FOLDERS = ("/assets/", "/static/")
CALLS = ("queue/join", "queue/data", "cancel", "reset", "startup-events", "theme.css")


def is_allowed(path: str) -> bool:
    if path.startswith(PREFIX):
        call = path.removeprefix(PREFIX).rstrip("/")
        return call in CALLS or call.startswith("heartbeat/")
    return path in PATHS or path.startswith(FOLDERS)


class OwnPathsOnly:
    """404 for everything else that the library would answer."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan" or (kind == "http" and is_allowed(scope["path"])):
            await self.app(scope, receive, send)
        elif kind == "http":
            await PlainTextResponse("not here", status_code=404)(scope, receive, send)
        else:
            await WebSocketClose()(scope, receive, send)


def middleware(host: str) -> list[Middleware]:
    """On this machine's own address a page is asked as localhost or that address, perhaps through a tunnel; a browser that was
    lured by another site's name, which resolves to it, says that name."""
    names = [*LOCAL_HOSTS, "[::1]"] if host in LOCAL_HOSTS else ["*"]
    return [Middleware(TrustedHostMiddleware, allowed_hosts=names), Middleware(OwnPathsOnly)]
