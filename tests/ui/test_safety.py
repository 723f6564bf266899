"""Attacks: paths that lead out, links, crafted names, markup, bombs, other sites, no password."""

import asyncio
import base64
import json
import struct
import zlib
from http.client import HTTPConnection
from pathlib import Path

import gradio as gr
import httpx
import pytest
from PIL import Image
from pydantic import Field

from equipoise.errors import ConfigError, InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.cli import main
from equipoise.pipelines.config.records import LocalPath, RunConfig, Section
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.runs.store import Store
from equipoise.ui import (
    api,
    compare,
    compare_cell,
    compare_grid,
    draw,
    forms,
    launch,
    launch_pictures,
    launch_tab,
    runs,
    runs_detail,
)
from equipoise.ui.command import _root
from equipoise.ui.guard import ROOM, make_room
from equipoise.ui.safety import OFFERED, PICTURES, UPLOAD, Site, check_picture, read_password

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
    return hide(site, run)


def hide(site: Site, run) -> Path:
    """A file beside the runs folder, a link to it in a run, and files of kinds that are not served."""
    file = site.store.root.parent / "secret.txt"
    file.write_text("the secret")
    (run.folder / "link.txt").symlink_to(file)
    (run.folder / ".hidden.txt").write_text("the secret")
    (run.result / "model.pkl").write_text("the secret")
    return file


@pytest.fixture(scope="module")
def server(site_of_all, serve_all, tmp_path_factory):
    """A server that anybody on this machine may ask, which puts uploads into a folder of its own."""
    return serve_all(site_of_all.store.root, TMPDIR=str(tmp_path_factory.mktemp("temporary")))


@pytest.fixture(scope="module")
def guarded(site_of_all, serve_all):
    """One that wants a password."""
    return serve_all(site_of_all.store.root, EQUIPOISE_UI_AUTH="me:correct horse")


@pytest.mark.parametrize("name", NAMES)
def test_no_name_leads_out(site, secret, name):
    with pytest.raises(InputError, match="no such file"):
        site.file(name)


def test_what_is_served_and_to_whom(site_of_all, server):
    run = site_of_all.store.get("one")
    secret = hide(site_of_all, run)
    with httpx.Client(base_url=server.url) as client:
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


def test_nothing_is_fetched_for_a_form(server):
    """A file of a form is what was uploaded: of an address gradio would take what it finds there."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        event = next(one for one in client.get("/config").json()["dependencies"] if one["api_name"] == "on_upload")
        for path in ("http://127.0.0.1:1/a.png", " HTTPS://example.org/a.png", "file:///etc/passwd", "ftp://a/b"):
            file = {"path": path, "meta": {"_type": "gradio.FileData"}}
            for data in ([[file], None], [{"deep": [file]}, None]):
                asked = {"data": data, "fn_index": event["id"], "session_hash": "s"}
                answer = client.post("/gradio_api/queue/join", json=asked)
                assert answer.status_code == 400 and "not fetched from addresses" in answer.text, path
        assert client.post("/gradio_api/queue/join", content=b"[" * 100_000).status_code in (400, 422)
        asked = {"data": [None, None], "fn_index": event["id"], "session_hash": "s"}
        assert client.post("/gradio_api/queue/join", json=asked).status_code == 200
        fetched = [f"{it}{server.url}/config" for it in ("/gradio_api/file=", "/file=", "/gradio_api/proxy=")]
        closed = ["/openapi.json", "/gradio_api/openapi.json", "/gradio_api/dev/reload", "/dev/reload/"]
        for path in (*closed, *fetched, "/gradio_api/file=https%3A//example.org/"):
            answer = client.get(path)
            assert (answer.status_code, answer.text) == (404, "There is nothing here."), path


def test_what_a_page_would_never_send_gets_a_sentence(site, run, ask):
    assert "Choose a YAML file" in str(ask("on_yaml", None))
    assert "must be one word" in str(ask("on_use", None, None, None, None)) and ask("on_upload", None, None)
    for prompt in ("a\0b", "a\ud800b"):
        assert "characters that are no text" in str(ask("start", ["one"], prompt, 1, 1))


def test_ids_are_ids(site, run, secret):
    for id in ("../one", "/etc", str(run.folder), "one/../one", "o", "latest", "one/result", "<b>"):
        with pytest.raises(InputError):
            runs.open_run(site, id)
        for what in ("stop", "resume", "delete", "sample"):
            with pytest.raises(InputError):
                runs_detail.act(site, id, what, 1)
        with pytest.raises(InputError):
            compare.generate(site, [id], "a cat", 1, 1.0)
        assert "notice bad" in runs_detail.detail(site, id, None)[0]
    assert run.folder.is_dir()


def test_a_run_that_is_a_link_is_not_opened(site, run, tmp_path):
    other = tmp_path / "elsewhere"
    run.folder.rename(other)
    (site.store.root / "one").symlink_to(other)
    with pytest.raises(InputError, match="outside"):
        runs_detail.act(site, "one", "delete", 1)
    assert other.is_dir()


def choices(site: Site, at: str = "") -> list[str]:
    return [choice for _, choice in site.choices(at)]


def test_one_walks_through_folders_and_not_out(site):
    deep = site.data["photos"] / "cats" / "black"
    (deep / "kittens").mkdir(parents=True)
    (deep / "list.csv").touch()
    (deep / "a.png").touch()
    (deep / "away").symlink_to("/etc")
    assert choices(site) == ["photos", "photos/cats"]
    assert choices(site, "photos/cats") == ["photos", "photos/cats", "photos/cats/black"]
    here = "photos/cats/black"
    there = ["photos", "photos/cats", here, f"{here}/kittens", f"{here}/list.csv"]
    assert choices(site, here) == choices(site, f"{here}/list.csv") == choices(site, f"{here}/gone") == there
    for at in ("photos/..", "photos/../photos/out", "photos/out", "/etc", "demo", "photos/\0"):
        assert choices(site, at) == ["photos", "photos/cats"], at
    for index in range(OFFERED + 3):
        (deep / "kittens" / f"{index:03d}").mkdir()
    (*_, last), words = choices(site, f"{here}/kittens"), site.choices(f"{here}/kittens")[-1][0]
    assert last == f"{here}/kittens" and words.startswith("… 3 more in")


def test_links_in_a_folder_do_not_lead_out(site, tmp_path):
    """Neither those of files nor those of folders, nor those behind links within the root."""
    cats, shown = site.data["photos"] / "cats", forms.show(configs.load("text_to_image/demo"))
    (site.data["photos"] / "dogs").mkdir()
    (tmp_path / "private.png").touch()

    def made() -> launch.Plan:
        place = {"data.folder": "photos/cats"}
        return launch.plan(site, "text_to_image", "text_to_image/demo", shown | place, [])

    (cats / "dogs").symlink_to("../dogs")
    (site.data["photos"] / "dogs" / "cats").symlink_to("../cats")
    assert made().config.data.folder == str(cats), "within the root they may lead anywhere, in circles too"
    link = site.data["photos"] / "dogs" / "a.png"
    for target in (tmp_path / "private.png", "/etc"):
        link.symlink_to(target)
        with pytest.raises(ConfigError, match=f"data.folder: {link} is a link that leads out"):
            made()
        link.unlink()
    assert made()


def test_conversations_are_confined_too(site, tmp_path):
    """Further data sets, those of a pattern, and those that are elsewhere."""
    shown, cats = forms.show(configs.load("instruction_tuning/demo")), site.data["photos"] / "cats"

    def made(file: str, more: str = "") -> launch.Plan:
        data = {"data.file": file, "data.more": more, "coordinator.name": ["constant"]}
        return launch.plan(site, "instruction_tuning", "instruction_tuning/demo", shown | data, [])

    (cats / "a.jsonl").touch()
    assert made("photos/cats/*.jsonl", str(cats / "a.jsonl")).config.data.file == f"{cats}/*.jsonl"
    for file, more in (("/etc/*.jsonl", ""), ("hub:owner/name", ""), ("photos/cats/a.jsonl", "/etc/passwd")):
        with pytest.raises(ConfigError, match="may read"):
            made(file, more)
    (cats / "b.jsonl").symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match=r"b.jsonl is a link that leads out"):
        made("photos/cats/*.jsonl")


def test_a_folder_of_data_may_have_any_name_that_is_no_path(tmp_path):
    (tmp_path / "my photos").mkdir()
    assert _root(f"my photos={tmp_path}/my photos") == ("my photos", (tmp_path / "my photos").resolve())
    site = Site(Store(tmp_path / "runs"), dict([_root(f"my photos={tmp_path}")]))
    assert site.path("my photos/my photos") == str((tmp_path / "my photos").resolve())
    assert "my photos/my photos/" in [words for words, _ in site.choices("my photos")]
    with pytest.raises(InputError, match="leads out"):
        site.path("my photos/../secret.txt")
    for name in ("", " ", "a/b", "..", ".hidden", "~", "a\nb", "demo", "uploads"):
        with pytest.raises(InputError, match="cannot be its name"):
            _root(f"{name}={tmp_path}")
    for word in ("photos", "photos=", f"photos={tmp_path}/nowhere"):
        with pytest.raises(InputError, match="must be NAME=FOLDER"):
            _root(word)


def test_data_is_confined_to_its_roots(site, tmp_path):
    (tmp_path / "private").mkdir()
    shown = forms.show(configs.load("text_to_image/demo"))
    for place in (str(tmp_path / "private"), "/etc", "~", "../..", "photos/../private", "photos/out"):
        with pytest.raises((ConfigError, InputError), match="may read"):
            launch.plan(site, "text_to_image", "text_to_image/demo", {**shown, "data.folder": place}, [])
    made = launch.plan(site, "text_to_image", "text_to_image/demo", {**shown, "data.folder": "photos/cats"}, [])
    assert made.config.data.folder == str(site.data["photos"] / "cats")
    assert made.config.runs == str(site.store.root)
    assert "photos/out" not in choices(site)


def opened(cls: type) -> list[str]:
    return [key.key for key in configs.describe(cls) if key.opened]


def test_the_page_starts_no_command_of_another_program(site):
    """Neither from a form, an axis or a YAML file, nor by resuming a run that was made elsewhere."""
    command = "touch here {output} {learning_rate}"
    base = configs.load("text_to_image/demo", [f"runs={site.store.root}"])
    shown = launch.forms.show(base)
    assert "script" not in {field.key.key for field in forms.fields(type(base))}
    for axes in ({"script": [command]}, {"script": [command, None]}):
        with pytest.raises(ConfigError, match="script: this page starts no commands"):
            launch.plan(site, "text_to_image", "text_to_image/demo", {**shown, "sweep": json.dumps(axes)}, [])
    given = configs.set_keys(base, {"script": command})
    with pytest.raises(ConfigError, match="script: this page starts no commands"):
        api.check(site, 1, configs.dump(given))
    made = site.store.create(given, id="theirs")
    with pytest.raises(InputError, match="script: this page starts no commands"):
        runs_detail.act(site, made.id, "resume", 1)
    assert not made.status().started
    swept = sweeps.create(configs.set_keys(base, {"sweep": {"script": [command, None]}}), id="axis")
    swept.update(state="stopped")
    with pytest.raises(InputError, match="script: this page starts no commands"):
        runs_detail.act(site, swept.id, "resume", 1)
    assert swept.status().state == "stopped"


def test_a_run_of_another_program_is_not_put_into_a_form_without_its_command(site, tmp_path):
    """There it would train by Equipoise's own optimizer."""
    base = configs.load("text_to_image/demo", [f"runs={site.store.root}"])
    command = "touch here {output} {learning_rate}"

    async def built() -> tuple:  # where no loop runs, gradio makes some that nobody closes
        with gr.Blocks():
            return gr.HTML(), gr.Tabs(), *launch_tab.build(site, 1)

    with asyncio.Runner() as loop:
        message, tabs, found, pipelines = loop.run(built())
    form = found["text_to_image"]
    for name, given in (("theirs", {"script": command}), ("axis", {"sweep": {"script": [command, None]}})):
        config = configs.set_keys(base, given)
        site.store.create(config, id=name)
        updates = launch_tab.filled(launch_tab.Launch(found, pipelines, tabs), site, name, message)
        assert list(updates) == [message] and "this page starts no commands" in updates[message]
        file = tmp_path / "given.yaml"
        file.write_text(configs.dump(config))
        updates = launch_tab.on_yaml(form, str(file))
        assert list(updates) == [form.message] and "this page starts no commands" in updates[form.message]


@pytest.mark.parametrize("name", ["text_to_image/demo", "instruction_tuning/demo", "audio_visual/demo"])
def test_every_key_that_is_a_path_is_confined_however_it_is_written(site, tmp_path, monkeypatch, name):
    (tmp_path / "private").mkdir()
    (tmp_path / "away").symlink_to(tmp_path / "private")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    base = configs.load(name)
    alone = configs.set_keys(base, {"sweep": {}})  # one run; a sweep's cells take the same way, a dozen times
    keys = [key for key in opened(type(base)) if key != "runs"]
    ways = [
        *("private", "./" * 201 + "private", "away", "~/private", "photos/../../private", "", " ", ".", "..", "/"),
        *("x" * 5000, "private/" * 900, "%70rivate", "..\\private", "file:private", str(tmp_path / "private")),
    ]
    several = {key.key for key in configs.describe(type(base)) if key.type.startswith("list")}
    for key in keys:

        def given(way: str, key: str = key) -> dict:
            return {key: [way] if key in several else way}

        for written, way in [(base, ways[0]), *((alone, way) for way in ways)]:
            with pytest.raises((ConfigError, InputError), match=rf"{key}: .*(may read|is empty|leads out)"):
                if problems := site.problems(configs.set_keys(written, given(way))):
                    raise ConfigError(problems)
        assert site.problems(configs.set_keys(base, given(str(site.data["photos"] / "cats")))) == []
        with pytest.raises(ConfigError, match=key):
            configs.set_keys(base, given("photos/\0private"))
    assert site.problems(base) == []
    at_hub = {key.key for key in configs.describe(type(base)) if key.opened and key.opened.hub}
    (tmp_path / "owner").mkdir()
    for key in at_hub:
        assert site.problems(configs.set_keys(base, {key: "owner/name"})) == []
    (tmp_path / "owner" / "name").mkdir()
    for key in at_hub:  # as transformers and diffusers take it then
        assert site.problems(configs.set_keys(base, {key: "owner/name"}))


def test_a_sweep_leads_out_no_more_than_its_cells(site, tmp_path, run):
    """In the form and at /check, which opens what it estimates; and it is kept where the server keeps runs."""
    private, base = str(tmp_path / "private"), configs.load("text_to_image/demo")
    shown = launch.forms.show(base)
    for axis in ({"model.path": ["demo", private]}, {"data": [{"folder": private}]}, {"judges.clip": [private]}):
        text = configs.dump(configs.set_keys(base, {"sweep": axis}))
        with pytest.raises(ConfigError, match="may read"):
            api.check(site, 1, text)
        with pytest.raises(ConfigError, match="may read"):
            launch.plan(site, "text_to_image", "text_to_image/demo", {**shown, "sweep": json.dumps(axis)}, [])
    text = configs.dump(configs.set_keys(base, {"runs": private, "sweep": {}}))
    assert f"runs: {site.store.root}" in api.check(site, 1, text)["yaml"]
    with pytest.raises(ConfigError, match="runs: is no axis"):
        api.check(site, 1, configs.dump(configs.set_keys(base, {"sweep": {"runs": [private]}})))
    assert not (tmp_path / "private").exists()


@pytest.mark.parametrize("name", ["text_to_image/demo", "instruction_tuning/demo", "audio_visual/demo"])
def test_a_revision_leads_nowhere_else(name):
    """Hubs' libraries make a path of it."""
    base = configs.load(name)
    keys = [key for key in configs.flat(base) if key.endswith((".revision", ".variant"))]
    assert keys
    for key in keys:
        for good in ("main", "refs/pr/1", "v1.0", "0123456789abcdef", "fp16"):
            assert configs.flat(configs.set_keys(base, {key: good}))[key] == good
        for bad in ("/etc/passwd", "../../x", "a/../b", "a//b", "", ".", "a/.", "~", "a\\b", "a\n"):
            with pytest.raises(ConfigError, match=f"{key}: must be a branch"):
                configs.set_keys(base, {key: bad})


def test_paths_in_lists_and_records_of_others_are_confined_too(site, tmp_path):
    class Lists(Section):
        many: list[LocalPath] = Field([], description="d")
        some: list[LocalPath] | None = Field(None, description="d")
        named: dict[str, LocalPath] = Field({}, description="d")
        unmarked: str = Field("", description="d")

    class Others(RunConfig):
        pipeline: str = "others"
        name: str = "run"
        lists: Lists = Field(default_factory=Lists)

    inside, outside = str(site.data["photos"] / "cats"), str(tmp_path / "private")
    for value in ({"many": [outside]}, {"some": [inside, outside]}, {"named": {"a": outside}}, {"unmarked": outside}):
        assert len(site.problems(Others(lists=value))) == 1, value
    assert site.problems(Others(lists={"many": [inside], "named": {"a": inside}, "unmarked": "a word"})) == []
    with pytest.raises(ValueError, match="names no file"):
        Lists(many=[inside, ""])
    assert Lists(named={"a": "~/x"}).named == {"a": str(Path.home() / "x")}


WORDS = {  # texts that nothing opens; what is opened is of the type LocalPath, DataPath, ModelPath or BasePath
    *("name", "optimizer.name", "objective.name", "coordinator.name", "token.name", "token.start", "prior.prompt"),
    *("model.revision", "model.variant", "model.audio.revision", "model.visual.revision", "model.text.revision"),
    *("data.instance_prompt", "data.prompt", "data.question", "samples.negative", "schedule.rules"),
}


@pytest.mark.parametrize("name", ["text_to_image/demo", "instruction_tuning/demo", "audio_visual/demo"])
def test_no_key_that_is_opened_goes_without_its_mark(name):
    keys = configs.describe(type(configs.load(name)))
    texts = {key.key for key in keys if key.type in ("str", "str or none") and not key.choices and not key.opened}
    assert texts - {"pipeline", "script"} <= WORDS  # a page starts no script


def test_a_pipeline_begins_with_a_shipped_configuration_and_no_file(site, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(configs.dump(configs.load("text_to_image/demo")))
    shown = forms.show(configs.load("text_to_image/demo"))
    for name in (str(file), "/etc/passwd", "../mine.yaml"):
        with pytest.raises(InputError, match="not the name of a shipped configuration"):
            launch.plan(site, "text_to_image", name, shown, [])


@pytest.mark.parametrize("text", ["vase", "/imagine a cat", "~ a cat ~", "~nobody/x", "../a cat"])
def test_words_are_no_paths(site, tmp_path, monkeypatch, text):
    """A prompt may begin as a path does, and a run be called as a folder beside the server is."""
    for name in ("vase", "text_to_image", "cosine"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    shown = forms.show(configs.load("text_to_image/demo")) | {"name": "vase", "schedule.name": "cosine"}
    words = {"samples.prompts": text, "samples.negative": text, "data.instance_prompt": text}
    made = launch.plan(site, "text_to_image", "text_to_image/demo", {**shown, **words}, [])
    assert made.config.samples.prompts == [text] and made.config.name == "vase"
    for key in ("data.folder", "model.path", "lora.start"):
        with pytest.raises((ConfigError, InputError), match=r"may read|no such user"):
            launch.plan(site, "text_to_image", "text_to_image/demo", {**shown, key: text}, [])


def test_links_in_a_circle_are_passed_over(site):
    (site.data["photos"] / "loop").symlink_to("loop")
    assert "photos/cats" in choices(site) and "photos/loop" not in choices(site)
    with pytest.raises(InputError, match="leads out"):
        site.path("photos/loop")


def test_markup_is_shown_as_text(site, finish, swept):
    config = configs.load("text_to_image/demo", [f"runs={site.store.root}"])
    finish(
        site.store.create(config, id="x"), "failed", message="<script>alert(1)</script> <img src=x onerror=alert(1)>"
    )
    site.store.get("x").log("<script>alert(2)</script>")
    shown = "".join([runs.table(site), *map(str, runs_detail.detail(site, "x", None)[:4])])
    shown += compare_grid.grid(site, "grid/comparison") + compare_cell.cell_detail(site, "grid/comparison", ["base"], 1)
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
            launch_pictures.save_pictures(site, name, [str(good)], [])
    with pytest.raises(InputError, match="choose 1 to"):
        launch_pictures.save_pictures(site, "many", [str(good)] * (PICTURES + 1), [])
    folder = Path(launch_pictures.save_pictures(site, "mine", [str(good)], [["a.png", "a <b>red</b> square"]]))
    assert folder.parent == site.store.root / "uploads"
    assert json.loads((folder / "metadata.jsonl").read_text()) == {
        "file_name": "000.png",
        "text": "a <b>red</b> square",
    }
    assert str(folder) in choices(site) and site.store.list() == []


def test_a_photograph_with_another_behind_it_is_a_jpeg(tmp_path):
    """As phones take them, with a picture of the depth: what Pillow calls MPO."""
    two = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    two[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=two[1:])
    assert check_picture(tmp_path / "a.jpg", "a.jpg") == ".jpg"


def test_a_picture_is_kept_under_the_suffix_of_its_format(site, tmp_path):
    """Whatever it is called: pipelines find pictures by their suffixes."""
    for name, kind in (("a.jfif", "JPEG"), ("b.html", "PNG"), ("c.png", "WEBP")):
        Image.new("RGB", (8, 8)).save(tmp_path / name, format=kind)
    kept = launch_pictures.save_pictures(
        site, "mine", [str(tmp_path / name) for name in ("a.jfif", "b.html", "c.png")], [], "a square"
    )
    assert sorted(file.name for file in Path(kept).iterdir()) == ["000.jpg", "001.png", "002.webp", "metadata.jsonl"]


def test_nothing_is_left_in_the_temporary_folder(site, serve, tmp_path):
    (tmp_path / "temporary").mkdir()
    server = serve(site.store.root, TMPDIR=str(tmp_path / "temporary"))
    files = [("files", ("a.png", b"x"))]
    (kept,) = httpx.post(f"{server.url}/gradio_api/upload", files=files).json()
    assert Path(kept).is_relative_to(tmp_path / "temporary") and Path(kept).is_file()
    server.stop()
    assert not any(path.is_file() for path in (tmp_path / "temporary").rglob("*"))


def test_uploads_do_not_pile_up(server):
    (place,) = Path(server.environment["TMPDIR"]).glob("equipoise-ui-*")
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for count, wanted in ((PICTURES, 200), (PICTURES + 1, 413), (1000, 413)):
            files = [("files", (f"{index}.png", bytes(300))) for index in range(count)]
            answer = client.post("/gradio_api/upload", files=files)
            assert answer.status_code == wanted, answer.text
        assert client.post("/gradio_api/upload", content=iter([b"x"])).status_code == 411
        lying = {"content-length": "5", "transfer-encoding": "chunked"}
        assert client.post("/gradio_api/queue/join", content=iter([b"x" * 100]), headers=lying).status_code in (
            400,
            411,
        )
    for path, length in (("/gradio_api/upload", ROOM + 1), ("/gradio_api/queue/join", UPLOAD + 1)):
        said = HTTPConnection("127.0.0.1", server.port, timeout=60)
        said.putrequest("POST", path)
        said.putheader("Content-Length", str(length))
        said.endheaders()  # that is all: it is refused before anything is read
        assert said.getresponse().status == 413
        said.close()
    kept = make_room(place)
    assert kept and make_room(place, age=-1) == 0 and not [file for file in place.rglob("*") if file.is_file()]


def test_used_pictures_are_not_kept_twice(site, tmp_path, monkeypatch):
    (tmp_path / "kept").mkdir()
    monkeypatch.setenv(launch.UPLOADED, str(tmp_path / "kept"))
    for place in (tmp_path / "kept", tmp_path):
        (place / "a.png").touch()
    launch_pictures.forget(
        [str(tmp_path / "kept" / "a.png"), str(tmp_path / "a.png"), str(tmp_path / "kept" / ".." / "a.png")]
    )
    assert not (tmp_path / "kept" / "a.png").exists() and (tmp_path / "a.png").exists(), "only what lies there"


def test_no_page_shows_this_one_in_a_frame(guarded):
    for path in ("/", "/config", "/runs-file/one/config.yaml", "/none"):
        for headers in ({}, basic("me:correct horse")):
            answer = httpx.get(guarded.url + path, headers=headers)
            assert answer.headers["x-frame-options"] == "DENY", path
            assert answer.headers["content-security-policy"] == "frame-ancestors 'none'"


def basic(word: str) -> dict[str, str]:
    return {"authorization": f"Basic {base64.b64encode(word.encode()).decode()}"}


def test_the_password_stands_before_every_route(guarded):
    with httpx.Client(base_url=guarded.url) as client:
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
