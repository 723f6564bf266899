"""The page put together, the files beside it, and the server."""

import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse, Response

from equipoise import registry
from equipoise.errors import InputError
from equipoise.pipelines.runs.store import Store
from equipoise.quick import no_garbage_collection
from equipoise.ui import api, compare_tab, launch, launch_tab, plugins, read_only, runs_tab, talk, theme
from equipoise.ui.answers import ANSWERS, without_places
from equipoise.ui.guard import Guard
from equipoise.ui.safety import SUFFIXES, ZIPPED, Site

LOCAL = frozenset({"127.0.0.1", "localhost", "::1"})
LOOK = 0.02  # seconds that an event may wait


@dataclass
class Page:
    """What tabs are drawn with, and what the first leaves for the second."""

    site: Site
    workers: int
    tabs: gr.Tabs
    launch: Any = None  # the forms, which Runs and Compare fill


def _launch(page: Page, tab: gr.Tab) -> None:
    forms, pipelines = launch_tab.build(page.site, page.workers)
    page.launch = launch_tab.Launch(forms, pipelines, page.tabs)


def _runs(page: Page, tab: gr.Tab) -> None:
    runs_tab.build(page.site, page.workers, page.launch, tab)


TABS: dict[str, Callable[[Page, gr.Tab], None]] = {  # in their order; each draws itself into the tab that it is given
    "Launch": _launch,
    "Runs": _runs,
    "Compare": lambda page, tab: compare_tab.build(page.site, page.launch, tab),
    "Talk": lambda page, tab: talk.build(page.site, tab),
    "Plugins": lambda page, tab: plugins.build(tab),
}


def page(site: Site, workers: int) -> gr.Blocks:
    """All tabs."""
    with (
        registry.looked_up_once(),
        gr.Blocks(title="Equipoise", analytics_enabled=False, fill_width=True) as blocks,
    ):
        gr.HTML("<div class='brand'><h1>Equipoise</h1><span>fine-tuning that forgives the learning rate</span></div>")
        with gr.Tabs(elem_id="tabs") as tabs:
            shared = Page(site, workers, tabs)
            for name, build in TABS.items():
                with gr.Tab(name, id=name.lower()) as tab:
                    build(shared, tab)
        api.build(site, workers)
        blocks.load(None, None, None, js="() => equipoise.restore()", api_visibility="private")
    return blocks


def application(site: Site, workers: int, auth: tuple[str, str] | None = None, hosts: frozenset[str] = LOCAL) -> Any:
    """The page, and the files of the runs folder below /runs-file/, behind the guard: an ASGI application."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.get("/runs-file/{name:path}")
    def runs_file(name: str, download: bool = False) -> Response:
        try:
            file = site.file(name)
        except InputError as error:
            raise HTTPException(404, str(error)) from None
        kind = SUFFIXES[file.suffix]
        show = kind.startswith("image/") and not download  # nothing else is ever shown by the browser from here
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        if file.name == ANSWERS:
            headers["Content-Disposition"] = f'attachment; filename="{ANSWERS}"'
            text = without_places(file.read_text(encoding="utf-8", errors="replace"))
            return Response(text, media_type=kind, headers=headers)
        return FileResponse(
            file,
            media_type=kind,
            filename=file.name,
            content_disposition_type="inline" if show else "attachment",
            headers=headers,
        )

    blocks = page(site, workers)
    if site.read_only:
        read_only.close(blocks)
    mounted = gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        theme=theme.theme(),
        css=theme.css(),
        head=theme.head(list(TABS)),
        footer_links=[],
        run_history=False,
        max_file_size=ZIPPED,
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
    )
    # Gradio looks a thousand times a second whether anything was asked, which takes a twentieth of a core.
    blocks._queue.sleep_when_free, blocks._queue.progress_update_sleep_when_free = LOOK, 0.1
    blocks.has_launched = True  # mounting leaves it False, and gradio then skips its own check of files' paths
    uploads = os.environ.get(launch.UPLOADED)
    files = {} if site.read_only else takes_files(blocks)
    return Guard(mounted, auth, hosts, Path(uploads) if uploads else None, files)


def takes_files(blocks: gr.Blocks) -> dict[int, list[int]]:
    """Which inputs of each event are of files: the event's number → their indices, counted from 0."""
    kinds = (gr.File, gr.UploadButton)
    found = {
        number: [index for index, part in enumerate(event.inputs) if isinstance(part, kinds)]
        for number, event in blocks.fns.items()
    }
    return {number: indices for number, indices in found.items() if indices}


def serve(
    host: str,
    port: int,
    auth: tuple[str, str] | None,
    root: str | None,
    data: dict[str, Path],
    workers: int,
    read_only: bool = False,
) -> None:
    """Serves until interrupted.

    Raises:
        InputError: another address than this machine's own without a password, or a port that is in use.
    """
    if host not in LOCAL and auth is None:
        raise InputError(
            f"--host {host}: everybody who reaches this machine could start runs; give --auth FILE with NAME:PASSWORD."
        )
    site = Site(Store(root), data, read_only)
    # The protocol is named so that asyncio turns Nagle's algorithm off, which costs 40 ms at each small answer.
    mine = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    mine.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        mine.bind((host, port))
        mine.listen(128)  # who comes before everything is ready waits
    except (OSError, OverflowError) as error:
        mine.close()
        words = getattr(error, "strerror", None) or "ports go from 0 to 65535"
        raise InputError(f"--port {port}: cannot be used on {host}: {words}. Give another one.") from error
    port = mine.getsockname()[1]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that it tidies up after itself, as after Ctrl-C
    with tempfile.TemporaryDirectory(prefix="equipoise-ui-") as uploaded:
        os.environ[launch.UPLOADED] = uploaded
        _serve(mine, host, port, site, workers, auth)


def _serve(mine: socket.socket, host: str, port: int, site: Site, workers: int, auth: tuple[str, str] | None) -> None:
    with no_garbage_collection():
        app = application(site, workers, auth, LOCAL if host in LOCAL else frozenset())
    warm = threading.Timer(1.0, _warm)  # when the page has been sent
    warm.daemon = True
    warm.start()
    print(
        f"Equipoise is at http://{host}:{port}, over the runs in {site.store.root}. Ctrl-C ends it, not the runs.",
        flush=True,
    )
    # open pages hold connections that never end by themselves
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)).run(sockets=[mine])


def _warm() -> None:
    """What the first check of a form needs, imported while the user still reads the page."""
    import torch  # noqa: F401
