"""No request, through whichever route, event or input, makes the server open, copy, name or serve a file of others.

The running app says itself which routes, events and inputs there are; none is listed here.
"""

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest
from gradio_client import Client
from PIL import Image, PngImagePlugin
from starlette.routing import Mount
from starlette.testclient import TestClient

from equipoise.pipelines import config as configs
from equipoise.ui.app import application
from equipoise.ui.guard import Guard
from equipoise.ui.safety import Site

SECRET = "hunter2-of-somebody-else"
META = {"_type": "gradio.FileData"}
# Put on the path of the server, where Python imports it at its start: names every file that is opened.
WATCH = """
import os, sys
def named(path):
    return "/private/hunter2" in os.path.realpath(os.fsdecode(path))
def watch(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)) and named(args[0]):
        os.write(log, os.fsencode(args[0]) + b"\\n")
log = os.open(os.environ["OPENED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
sys.addaudithook(watch)
"""


@dataclass
class Planted:
    """A server that is watched, and secrets beside its folders: a text, a picture and a configuration."""

    url: str
    folder: Path
    uploads: Path
    files: list[Path]
    opened: Path

    def nothing_came_out(self) -> None:
        """No secret was opened, and none of it is in any file but those planted."""
        assert self.opened.read_text() == ""
        for folder, _, names in os.walk(self.folder):
            for file in (Path(folder, name) for name in names):
                if file.is_file() and not file.is_symlink() and file not in self.files:
                    assert SECRET.encode() not in file.read_bytes(), file


@pytest.fixture(scope="module")
def server(site_of_all, serve_all) -> Planted:
    site, root = site_of_all, site_of_all.store.root.parent
    private, temporary, watch = root / "private", root / "temporary", root / "watch"
    for folder in (private, temporary, watch):
        folder.mkdir()
    (watch / "sitecustomize.py").write_text(WATCH)
    text, picture, yaml = (private / f"hunter2{suffix}" for suffix in (".txt", ".png", ".yaml"))
    text.write_text(SECRET)
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("comment", SECRET)
    Image.new("RGB", (8, 8)).save(picture, pnginfo=chunks)
    yaml.write_text(configs.dump(configs.load("text_to_image/demo", [f"name={SECRET}"])))
    server = serve_all(
        site.store.root,
        TMPDIR=str(temporary),
        PYTHONPATH=str(watch),
        OPENED=str(root / "opened"),
        PYTHONSAFEPATH="",
    )
    (uploads,) = temporary.glob("equipoise-ui-*")
    for file in (text, picture, yaml):
        (uploads / f"link{file.suffix}").symlink_to(file)
        (site.store.root / f"link{file.suffix}").symlink_to(file)
    return Planted(server.url, root, uploads, [text, picture, yaml], root / "opened")


@pytest.fixture
def planted(server) -> Iterator[Planted]:
    """With no uploads but those of the test itself."""
    yield server
    for file in [file for file in server.uploads.rglob("*") if file.is_file() and not file.is_symlink()]:
        file.unlink()


def names(secret: Path, planted: Planted) -> Iterator[str]:
    """The ways to name a file that lies elsewhere."""
    yield str(secret)
    yield os.path.relpath(secret)
    yield f"{planted.uploads}/../../private/{secret.name}"
    yield f"{planted.uploads}/link{secret.suffix}"
    yield f"./{'./' * 201}{os.path.relpath(secret)}"
    yield f"file://{secret}"
    yield quote(str(secret), safe="")
    yield f"{secret}\0.png"


def records(secret: Path, planted: Planted, uploaded: str) -> Iterator[Any]:
    """What gradio may take for a file, plain and within lists and dicts."""
    for name in names(secret, planted):
        yield {"path": name, "meta": META}
    plain = {"path": str(secret), "meta": META}
    yield {"path": str(secret)}
    yield {**plain, "is_stream": True}
    yield {**plain, "url": f"file://{secret}", "orig_name": str(secret), "size": 1, "mime_type": "image/png"}
    for key in ("url", "orig_name"):
        yield {key: str(secret), "meta": META}
        yield {"path": uploaded, key: str(secret), "meta": META}
    yield from ([plain], [[plain]], {"a": plain}, {"value": plain}, {"data": [[plain]], "headers": ["a"]})
    yield {"path": uploaded, "meta": {**META, "path": plain}}


def inputs(config: dict[str, Any]) -> Iterator[tuple[dict[str, Any], int, bool]]:
    """Every input of every event that the app itself lists: (event, place, whether it is for files)."""
    kinds = {part["id"]: part["type"] for part in config["components"]}
    for event in config["dependencies"]:
        for place, part in enumerate(event["inputs"]):
            yield event, place, kinds[part] in ("file", "uploadbutton")


def send(line: HTTPConnection, event: float | str, data: Any, session: str, **more: Any) -> tuple[int, str]:
    """The answer's status and text. Without httpx, of which sixteen thousand requests take longer than they need."""
    asked = {"data": data, "fn_index": event, "session_hash": session, "event_data": None, "trigger_id": None}
    body, headers = json.dumps({**asked, **more}).encode(), {"content-type": "application/json"}
    line.request("POST", "/gradio_api/queue/join", body, headers)
    answer = line.getresponse()
    return answer.status, answer.read().decode()


def test_no_input_of_any_event_takes_a_file_of_others(planted):
    """A record is refused before gradio sees it, unless it is of an upload, in an input for files."""
    text, picture, yaml = planted.files
    sessions = (f"s{number}" for number in count())
    with (
        httpx.Client(base_url=planted.url, timeout=60) as client,
        closing(HTTPConnection(urlsplit(planted.url).netloc, timeout=60)) as line,
    ):
        (uploaded,) = client.post("/gradio_api/upload", files=[("files", ("a.txt", b"mine"))]).json()
        config, tried, taken = client.get("/config").json(), 0, []
        takers = {event["id"] for event, _, for_files in inputs(config) if for_files}
        for event, place, for_files in inputs(config):
            for secret in (picture, yaml) if for_files else (text,):
                for record in records(secret, planted, uploaded):
                    data = [None] * len(event["inputs"])
                    data[place] = record
                    session = next(sessions)
                    status, words = send(line, event["id"], data, session)
                    tried += 1
                    if status == 200:
                        assert for_files and record["path"] == uploaded, (event["api_name"], place, record)
                        with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as events:
                            taken.append("".join(events.iter_text()))
                    else:
                        assert (status, uploaded in words) == (400, False), words
        for event in config["dependencies"]:  # what stands beside the inputs
            record, data = {"path": str(text), "meta": META}, [None] * len(event["inputs"])
            for more in ({"event_data": [record]}, {"trigger_id": record}, {"other": [record]}, {"data": record}):
                status, _ = send(line, event["id"], **{"data": data, "session": "s", **more})
                dropped = "event_data" in more and event["id"] in takers  # by the guard, where files are chosen
                assert status == (200 if dropped else 400), (event["api_name"], more)
                tried += 1
            files = [{"path": uploaded, "meta": META}] * len(event["inputs"])
            for number in (str(event["id"]), float(event["id"])):  # which gradio reads as the number
                assert send(line, number, files, "s")[0] == 400 or not data
            for route in ("call", "call/v2", "run", "api") if files else ():  # gradio goes by the number, not the name
                for name in ("upload", "upload/", "queue/join", "join", "comparison"):
                    form = {"data": files, "fn_index": event["id"], "session_hash": "s"}
                    answer = client.post(f"/gradio_api/{route}/{name}", json=form)
                    assert answer.status_code in (400, 404), (route, name)
    assert tried > 1000 and taken and not any(SECRET in words or str(text) in words for words in taken)
    planted.nothing_came_out()


def test_no_named_endpoint_takes_a_file_of_others(planted):
    """Through each of the four routes to an endpoint by its name, and gradio's own client."""
    text, *_ = planted.files
    with httpx.Client(base_url=planted.url, timeout=60) as client:
        (uploaded,) = client.post("/gradio_api/upload", files=[("files", ("a.txt", b"mine"))]).json()
        named = client.get("/gradio_api/info").json()["named_endpoints"]
        assert named
        for name, info in named.items():
            parameters = [one["parameter_name"] for one in info["parameters"]]
            for record in (*records(text, planted, uploaded), {"path": uploaded, "meta": META}):
                for place, parameter in enumerate(parameters):
                    data = [record if place == index else None for index in range(len(parameters))]
                    for route in ("call", "run", "api"):
                        answer = client.post(f"/gradio_api/{route}{name}", json={"data": data})
                        assert answer.status_code == 400 and str(planted.uploads) not in answer.text, route
                    assert client.post(f"/gradio_api/call/v2{name}", json={parameter: record}).status_code == 400
    planted.nothing_came_out()
    asked = Client(planted.url, verbose=False)
    for name, info in named.items():
        for place in range(len(info["parameters"])):
            for record in records(text, planted, uploaded):
                with pytest.raises(Exception) as refused:  # of whichever kind this client has
                    asked.predict(*[record if place == index else "" for index in range(place + 1)], api_name=name)
                assert SECRET not in str(refused.value) and str(planted.uploads) not in str(refused.value)
    assert planted.opened.read_text() == "", "the client may upload its own files; the server opens none"


def built(site: Site) -> Guard:
    """The app as it is served. Within a loop: where none runs, gradio makes some that nobody closes."""

    async def build() -> Guard:
        return application(site, 1)

    return asyncio.run(build())


def routes(app: Any, before: str = "") -> Iterator[tuple[str, str]]:
    """Every route of an app and of those mounted in it: (method, path)."""
    for route in app.routes:
        path = before.rstrip("/") + getattr(route, "path", "")
        if (router := getattr(route, "original_router", None)) is not None:  # FastAPI's include_router
            yield from routes(router, before)
        elif isinstance(route, Mount):
            yield from routes(route.app, path) if hasattr(route.app, "routes") else ()
        else:
            yield from ((method, path) for method in sorted(getattr(route, "methods", None) or ()))


def test_no_route_serves_a_file_of_others(planted, site):
    """Gradio's too, with the file's name in place of each part of the path that may vary, and as every query."""
    text, *_ = planted.files
    found = sorted(set(routes(built(site).app)))
    assert len(found) > 50
    form = {"data": [{"path": str(text), "meta": META}], "session_hash": "s", "fn_index": 0, "component_id": 1}
    with httpx.Client(base_url=planted.url, timeout=60) as client:
        for method, path in found:
            parts = path.split("{")
            for name in names(text, planted):
                whole = parts[0] + "".join(quote(name) + part.partition("}")[2] for part in parts[1:])
                asked = {"params": {"session_hash": name, "deep_link": name, "upload_id": name}}
                with suppress(httpx.TransportError):  # of streams, which say nothing or end early
                    sent = client.request(method, whole, timeout=5, **asked, json=form if method == "POST" else None)
                    assert SECRET not in sent.text, whole
                if len(parts) == 1:
                    break
        for name in (*names(text, planted), "../../private/new.txt", "/etc/new.txt"):
            (kept,) = client.post("/gradio_api/upload", files=[("files", (name.replace("\0", ""), b"mine"))]).json()
            assert Path(kept).resolve().is_relative_to(planted.uploads.resolve()), name
            assert client.get(f"/gradio_api/file={quote(kept)}").text == "mine", "what was uploaded is served"
    planted.nothing_came_out()


def test_answers_are_served_without_where_what_was_asked_about_lies(site, swept, answered):
    file = next(site.store.root.rglob("step-00000002/answers.jsonl"))
    with TestClient(built(site).app) as client:
        found = client.get(f"/runs-file/{file.relative_to(site.store.root)}")
    (record,) = map(json.loads, found.text.splitlines())
    assert record["media"] == ["a.png"] and record["answer"] == "blue"
    assert found.headers["content-disposition"].startswith("attachment")


def test_gradio_itself_checks_the_paths_of_files(site, tmp_path, monkeypatch):
    """Behind the guard, so that neither is the only one to stand there."""
    (tmp_path / "kept").mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "kept"))
    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET)
    with TestClient(built(site).app) as client:
        data = {"data": [{"path": str(secret), "meta": META}]}
        answer = client.post("/gradio_api/run/comparison", json=data)
        assert answer.status_code == 500 and SECRET not in answer.text
    assert not any(file.is_file() for file in (tmp_path / "kept").rglob("*"))
