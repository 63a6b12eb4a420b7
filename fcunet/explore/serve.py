"""A page of Panel on a port of this machine, which needs no other host."""

import os
import socket
import sys
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def run_server(
    page: Callable[[], Any], *, address: str, port: int, browser: bool, allow_origin: list[str]
) -> None:
    """Serve `page` (called once per browser tab) at ``/`` until interrupted; prints the address.

    Raises
    ------
    ValueError
        If the port is taken.
    """
    import panel as pn
    from tornado.ioloop import IOLoop

    pn.config.notifications = False
    try:
        server = pn.serve(
            {"/": page}, address=address, port=port, show=False, start=False, title="fcunet", threaded=False,
            websocket_origin=allow_origin or None, verbose=False, unused_session_lifetime=60_000,
        )  # fmt: skip
    except OSError as err:
        raise ValueError(f"port {port} of {address} cannot be used ({err.strerror}); try: --port 0") from err
    link = f"http://{address}:{server.port}/"
    print(f"explorer  {link}   (Ctrl-C ends it)", flush=True)
    if address in ("127.0.0.1", "localhost"):
        host = socket.gethostname()
        print(f"          from elsewhere: ssh -L {server.port}:127.0.0.1:{server.port} {host}", flush=True)
    server.start()
    if browser and has_display():
        with suppress(webbrowser.Error):
            webbrowser.open(link)
    elif browser:
        print("          no display here: open that address in a browser", flush=True)
    try:
        IOLoop.current().start()
    except KeyboardInterrupt:
        server.stop()


def has_display() -> bool:
    """Something can open a window; without it `webbrowser` would fill the terminal with a text browser."""
    return sys.platform in ("darwin", "win32") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))


def serve(
    results: str | Path,
    *,
    scan: str | Path | None = None,
    address: str = "127.0.0.1",
    port: int = 0,
    browser: bool = True,
    allow_origin: list[str] | None = None,
) -> None:
    """Serve the explorer of a result until interrupted; each browser tab has a view of its own.

    Parameters
    ----------
    results, scan
        As for :func:`explore`.
    address, port : str, int
        Where to listen; port 0 is any free one.
    browser : bool
        Open a browser, if this machine has a display.
    allow_origin : list of str, optional
        Other hosts (HOST:PORT) that pages may come from, such as that of a proxy; ``"*"`` is any.
    """
    from .app import explore
    from .sources import find_sources

    if not 0 <= port < 2**16:
        raise ValueError(f"port is {port}; ports are numbers from 1 to 65535, or 0 for any free one")
    find_sources(results, scan)  # what is wrong is said here, not in the browser
    run_server(
        lambda: explore(results, scan=scan).panel(),
        address=address, port=port, browser=browser, allow_origin=allow_origin or [],
    )  # fmt: skip
