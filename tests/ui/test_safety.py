"""Attacks: paths that lead out, links, crafted names, markup, bombs, other sites, no password."""

import base64
import json
import struct
import zlib
from pathlib import Path

import httpx
import pytest
from PIL import Image

from equipoise.errors import ConfigError, InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.cli import main
from equipoise.ui import compare, draw, launch, runs
from equipoise.ui.safety import PICTURES, Site, check_picture, read_password

NAMES = [
    "../secret.txt",
    "one/../../secret.txt",
    "one/%2e%2e/secret.txt",
    "/etc/passwd.txt",
    "one/.hidden.txt",
    "one/link.txt",
    "one/lock",
    "one/result/model.pkl",
    "index.sqlite",
    "one",
    "",
    "one/\0.txt",
]


@pytest.fixture
def secret(site: Site, run) -> Path:
    """A file beside the runs folder, a link to it in a run, and files of kinds that are not served."""
    file = site.store.root.parent / "secret.txt"
    file.write_text("the secret")
    (run.folder / "link.txt").symlink_to(file)
    (run.folder / ".hidden.txt").write_text("the secret")
    (run.result / "model.pkl").write_text("the secret")
    return file


@pytest.mark.parametrize("name", NAMES)
def test_no_name_leads_out(site, secret, name):
    with pytest.raises(InputError, match="no such file"):
        site.file(name)


def test_what_is_served_and_to_whom(site, run, secret, serve):
    with httpx.Client(base_url=serve(site.store.root).url) as client:
        assert client.get("/runs-file/one/config.yaml").text == (run.folder / "config.yaml").read_text()
        picture = client.get("/runs-file/one/samples/step-00000005/00-0.png")
        assert picture.headers["content-type"] == "image/png"
        assert picture.headers["content-disposition"].startswith("inline")
        report = client.get("/runs-file/one/log.txt")
        assert report.headers["content-disposition"].startswith("attachment")
        assert report.headers["x-content-type-options"] == "nosniff"
        for name in NAMES:
            if "\0" not in name:
                assert "the secret" not in client.get(f"/runs-file/{name}").text, name
        for route in ("/gradio_api/file=", "/file="):  # gradio's own way to files
            for path in (secret, run.folder / "config.yaml", "/etc/passwd"):
                assert client.get(f"{route}{path}").status_code in (403, 404), path
        assert client.get("/config").status_code == 200
        for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
            assert client.post("/gradio_api/queue/join", json={}, headers={"origin": origin}).status_code == 403
        for host in ("evil.example", "evil.example:7860", ""):  # a name that was made to point at this machine
            assert client.get("/config", headers={"host": host}).status_code == 403
        for crooked in ({"host": "["}, {"origin": "http://["}):
            assert client.get("/config", headers=crooked).status_code == 400
        mine = client.post("/gradio_api/queue/join", json={}, headers={"origin": str(client.base_url).rstrip("/")})
        assert mine.status_code == 422, "reached gradio, which misses the body"


def test_ids_are_ids(site, run, secret):
    for id in ("../one", "/etc", str(run.folder), "one/../one", "o", "latest", "one/result", "<b>"):
        with pytest.raises(InputError):
            runs.open_run(site, id)
        for what in ("stop", "resume", "delete", "sample"):
            with pytest.raises(InputError):
                runs.act(site, id, what, 1)
        with pytest.raises(InputError):
            compare.generate(site, [id], "a cat", 1, 1.0)
        assert "notice bad" in runs.detail(site, id, None)[0]
    assert run.folder.is_dir()


def test_a_run_that_is_a_link_is_not_opened(site, run, tmp_path):
    other = tmp_path / "elsewhere"
    run.folder.rename(other)
    (site.store.root / "one").symlink_to(other)
    with pytest.raises(InputError, match="outside"):
        runs.act(site, "one", "delete", 1)
    assert other.is_dir()


def test_data_is_confined_to_its_roots(site, tmp_path):
    (tmp_path / "private").mkdir()
    shown = launch.forms.show(configs.load("text_to_image/demo"))
    for place in (str(tmp_path / "private"), "/etc", "~", "../..", "photos/../private", "photos/out"):
        with pytest.raises((ConfigError, InputError), match="may read"):
            launch.plan(site, "text_to_image", "text_to_image/demo", {**shown, "data.folder": place}, [])
    made = launch.plan(site, "text_to_image", "text_to_image/demo", {**shown, "data.folder": "photos/cats"}, [])
    assert made.config.data.folder == str(site.data["photos"] / "cats")
    assert made.config.runs == str(site.store.root)
    assert "photos/out" not in site.choices()


@pytest.mark.parametrize("text", ["vase", "/imagine a cat", "~ a cat ~", "~nobody/x", "../a cat"])
def test_words_are_no_paths(site, tmp_path, monkeypatch, text):
    """A prompt may begin as a path does, and a run be called as a folder beside the server is."""
    for name in ("vase", "text_to_image", "cosine"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    shown = launch.forms.show(configs.load("text_to_image/demo")) | {"name": "vase", "schedule.name": "cosine"}
    words = {"samples.prompts": text, "samples.negative": text, "data.instance_prompt": text}
    made = launch.plan(site, "text_to_image", "text_to_image/demo", {**shown, **words}, [])
    assert made.config.samples.prompts == [text] and made.config.name == "vase"
    for key in ("data.folder", "model.path", "lora.start"):
        with pytest.raises((ConfigError, InputError), match="may read"):
            launch.plan(site, "text_to_image", "text_to_image/demo", {**shown, key: text}, [])


def test_links_in_a_circle_are_passed_over(site):
    (site.data["photos"] / "loop").symlink_to("loop")
    assert "photos/cats" in site.choices() and "photos/loop" not in site.choices()
    with pytest.raises(InputError, match="leads out"):
        site.place("photos/loop")


def test_markup_is_shown_as_text(site, finish, swept):
    config = configs.load("text_to_image/demo", [f"runs={site.store.root}"])
    finish(
        site.store.create(config, id="x"), "failed", message="<script>alert(1)</script> <img src=x onerror=alert(1)>"
    )
    site.store.get("x").log("<script>alert(2)</script>")
    shown = "".join([runs.table(site), *map(str, runs.detail(site, "x", None)[:4])])
    shown += compare.grid(site, "grid/comparison") + compare.cell_detail(site, "grid/comparison", ["base"], 1)
    for tag in ("<script", "<img src=x", "<i>cat", "<b>seen"):
        assert tag not in shown
    assert "&lt;script&gt;" in shown and "&lt;i&gt;cat" in shown
    assert draw.notice('"><b>') == '<ul class="notice info" role="status"><li>&quot;&gt;&lt;b&gt;</li></ul>'


def bomb(file: Path, side: int) -> Path:
    """A PNG of a few bytes that says it has side × side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )
    return file


def test_uploads(site, tmp_path):
    good = tmp_path / "a.png"
    Image.new("RGB", (8, 8), "red").save(good)
    for side in (9_000, 60_000):
        with pytest.raises(InputError, match="pixels"):
            check_picture(bomb(tmp_path / "bomb.png", side), "bomb.png")
    for name, data in {"text.png": b"not a picture", "cut.png": good.read_bytes()[:50], "e.png": b""}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match="not a picture"):
            check_picture(tmp_path / name, name)
    for name in ("", "../up", "a/b", "a b", "x" * 80):
        with pytest.raises(InputError, match="one word"):
            launch.save_pictures(site, name, [str(good)], [])
    with pytest.raises(InputError, match="choose 1 to"):
        launch.save_pictures(site, "many", [str(good)] * (PICTURES + 1), [])
    folder = Path(launch.save_pictures(site, "mine", [str(good)], [["a.png", "a <b>red</b> square"]]))
    assert folder.parent == site.store.root / "uploads"
    assert json.loads((folder / "metadata.jsonl").read_text()) == {
        "file_name": "000.png",
        "text": "a <b>red</b> square",
    }
    assert str(folder) in site.choices() and site.store.list() == []


def test_a_picture_is_kept_under_the_suffix_of_its_format(site, tmp_path):
    """Whatever it is called: pipelines find pictures by their suffixes."""
    for name, kind in (("a.jfif", "JPEG"), ("b.html", "PNG"), ("c.png", "WEBP")):
        Image.new("RGB", (8, 8)).save(tmp_path / name, format=kind)
    kept = launch.save_pictures(site, "mine", [str(tmp_path / name) for name in ("a.jfif", "b.html", "c.png")], [])
    assert sorted(file.name for file in Path(kept).iterdir()) == ["000.jpg", "001.png", "002.webp", "metadata.jsonl"]


def test_nothing_is_left_in_the_temporary_folder(site, serve, tmp_path):
    (tmp_path / "temporary").mkdir()
    server = serve(site.store.root, TMPDIR=str(tmp_path / "temporary"))
    files = [("files", ("a.png", b"x"))]
    (kept,) = httpx.post(f"{server.url}/gradio_api/upload", files=files).json()
    assert Path(kept).is_relative_to(tmp_path / "temporary") and Path(kept).is_file()
    server.stop()
    assert not any(path.is_file() for path in (tmp_path / "temporary").rglob("*"))


def basic(word: str) -> dict[str, str]:
    return {"authorization": f"Basic {base64.b64encode(word.encode()).decode()}"}


def test_the_password_stands_before_every_route(site, run, serve):
    server = serve(site.store.root, EQUIPOISE_UI_AUTH="me:correct horse")
    with httpx.Client(base_url=server.url) as client:
        routes = [
            "/",
            "/config",
            "/gradio_api/info",
            "/runs-file/one/config.yaml",
            "/gradio_api/queue/data?session_hash=x",
        ]
        for path in routes:
            for headers in ({}, basic("me:wrong horse"), basic("you:correct horse"), {"authorization": "Basic"}):
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401, path
                assert "www-authenticate" in answer.headers
        for path in ("/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/run/plugins"):
            assert client.post(path, json={}).status_code == 401, path
        assert client.get("/config", headers=basic("me:correct horse")).status_code == 200


def test_no_other_address_without_a_password(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("EQUIPOISE_UI_AUTH", raising=False)
    assert main(["ui", "--host", "0.0.0.0", "--port", "0", "--runs", str(tmp_path)]) == 2
    assert "give --auth FILE" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["ui", "--share"])
    for words, said in ((["--port", "99999"], "0 to 65535"), (["--port", "0", "--workers", "-2"], "at least 1")):
        assert main(["ui", *words, "--runs", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err


def test_passwords(tmp_path, monkeypatch):
    monkeypatch.setenv("EQUIPOISE_UI_AUTH", "me:from the environment")
    assert read_password(None) == ("me", "from the environment")
    file = tmp_path / "auth"
    file.write_text("me:a:long:one\n")
    assert read_password(file) == ("me", "a:long:one")
    for text in ("", "me", "me:", ":password", "me:short"):
        file.write_text(text)
        with pytest.raises(InputError, match="NAME:PASSWORD"):
            read_password(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_password(tmp_path / "none")
