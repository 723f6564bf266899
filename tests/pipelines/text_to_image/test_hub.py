"""Model cards, and the hub: its real client in a process of its own, against a server that keeps what it is sent."""

import ast
import hashlib
import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from equipoise.pipelines.cli import main
from equipoise.pipelines.text_to_image.result import LORA_FILE


@pytest.fixture
def tuned(short, tmp_path) -> Path:
    words = ["data.instance_prompt=a photo of sks | object", "samples.prompts=[one thing, another]", "lora.alpha=2"]
    assert main(["train", "text_to_image/dreambooth", *short, *words, "steps=1", "--id", "one"]) == 0
    return tmp_path / "runs" / "one"


def test_the_card_says_how_it_was_made_and_shows_what_it_draws(tuned, checkpoint):
    card = ModelCard.load(tuned / "result" / "README.md")
    told = card.data.to_dict()
    assert told["library_name"] == "diffusers" and told["pipeline_tag"] == "text-to-image"
    assert {"lora", "diffusers", "stable-diffusion"} <= set(card.data.tags)
    assert card.data.instance_prompt == "a photo of sks | object"
    assert card.data.base_model is None, "a folder is nobody else's"
    for shown, prompt in zip(card.data.widget, ["one thing", "another"], strict=True):
        assert shown["text"] == prompt
        assert shown["output"]["url"].startswith("images/")
        with Image.open(tuned / "result" / shown["output"]["url"]) as picture:
            assert picture.size == (32, 32)
    assert f"`{checkpoint.name}` (Stable Diffusion), rank 4, alpha 2" in card.text and str(checkpoint) not in card.text
    for line in ("| optimizer | scaled_adamw |", "| steps | 1 |", "| pictures | 4 |", "| learning rate | 0.0001 |"):
        assert line in card.text
    assert "sks \\| object" in card.text


def test_a_result_goes_to_the_hub_with_its_card_and_the_token_nowhere_else(tuned, hub):
    done = hub.push(tuned, "--private", "--format", "kohya")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"http://127.0.0.1:{hub.server_port}/somebody/vase"
    created = next(json.loads(body) for _, path, _, body in hub.asked if path == "/api/repos/create")
    assert created["name"] == "vase" and (created.get("private") or created.get("visibility") == "private")
    result = tuned / "result"
    assert hub.files.keys() == {
        LORA_FILE, "README.md", "images/00-0.png", "images/01-0.png", "kohya.safetensors",
    }  # fmt: skip
    for name in (LORA_FILE, "README.md", "images/00-0.png"):
        assert hub.files[name] == (result / name).read_bytes()
    assert hashlib.sha256((result / LORA_FILE).read_bytes()).hexdigest() in hub.large
    (result / "again.safetensors").write_bytes(hub.files["kohya.safetensors"])
    assert any(name.endswith(".alpha") for name in load_file(result / "again.safetensors"))

    writes = [who for _, path, who, _ in hub.asked if path.endswith(("/create", "/preupload/main", "/commit/main"))]
    assert writes == [f"Bearer {hub.secret}"] * 3
    assert hub.secret not in done.stdout + done.stderr
    kept = [file for file in tuned.parent.rglob("*") if file.is_file() and hub.secret.encode() in file.read_bytes()]
    assert kept == []


def test_what_goes_wrong_is_one_sentence_without_the_token(tuned, hub, monkeypatch, capfd):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert main(["export", str(tuned), "--push-to-hub", "vase"]) == 2
    assert "needs a token with write access in the environment variable HF_TOKEN" in capfd.readouterr().err
    hub.refuses = True
    done = hub.push(tuned)
    assert done.returncode == 1 and "did not take it" in done.stderr and "no rights for …" in done.stderr
    assert hub.secret not in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert main(["export", str(tuned)]) == 2, "neither a file nor a repository"


def test_the_cards_python_reads_whatever_a_prompt_holds(short, tmp_path):
    prompt = 'two\nlines, "quoted" \\ and \u2028 more'
    words = [f"data.instance_prompt={json.dumps(prompt)}", "samples.prompts=[]", "steps=1", "--id", "one"]
    assert main(["train", "text_to_image/dreambooth", *short, *words]) == 0
    card = (tmp_path / "runs" / "one" / "result" / "README.md").read_text()
    (call,) = [
        node
        for node in ast.walk(ast.parse(card.split("```python")[1].split("```")[0]))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "pipe"
    ]
    assert ast.literal_eval(call.args[0]) == prompt
