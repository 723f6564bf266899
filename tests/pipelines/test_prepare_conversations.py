"""`equipoise prepare conversations` shows what is trained on, and what is not and why, on the embedded model."""

import base64
import json

import pytest
from PIL import Image

from equipoise.pipelines.cli import main


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8), "red").save("red.png")
    url = f"data:image/png;base64,{base64.b64encode((tmp_path / 'red.png').read_bytes()).decode()}"
    asked = {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "is it red?"}],
    }
    more = [{"role": "user", "content": "sure?\x1b[2J"}, {"role": "assistant", "content": "quite."}]
    said = {"role": "assistant", "content": "yes."}
    records = [[asked, said], [asked, said, *more], [asked], [asked, said]]
    lines = [json.dumps({"messages": messages}) for messages in records] + ["{"]
    (tmp_path / "talk.jsonl").write_text("\n".join(lines))
    return tmp_path / "talk.jsonl"


def test_rows_are_shown_as_the_model_reads_them(file, capsys):
    assert main(["prepare", "conversations", "talk.jsonl", "--rows", "2"]) == 0
    first, text, _, second, other, _, counts, left_out, *why = capsys.readouterr().out.splitlines()
    assert first == "talk.jsonl:1: 1 picture, 26 tokens, 3 of them learnt"
    assert text == "<image>×12</s>Question: is it red? Answer:⟦ yes.</s>⟧"
    assert second.startswith("talk.jsonl:2: 1 picture, ")
    assert other == f"{text}Question: sure?\\x1b[2J Answer:⟦ quite.</s>⟧", "nothing in it steers the terminal"
    assert counts == "3 conversations with 3 pictures; ⟦this⟧ is what is learnt, as blip-2 reads it."
    assert left_out == "left out 2 of 5, which cannot be used; training refuses them without --skip-bad:"
    assert why[0] == "talk.jsonl:3: has no answer." and why[1].startswith("talk.jsonl:5: is not JSON (")
    assert sorted(path.name for path in file.parent.iterdir()) == ["red.png", "talk.jsonl"], "nothing is written"


def test_what_cannot_be_used_at_all_is_refused(file, capsys):
    for text, sentence in (
        ('{"messages": []}\n', "prepare: no conversation can be used:\ntalk.jsonl:1: has no conversations"),
        ("", "talk.jsonl: holds no conversations."),
    ):
        file.write_text(text)
        assert main(["prepare", "conversations", "talk.jsonl"]) == 2
        assert sentence in capsys.readouterr().err
    assert main(["prepare", "conversations", "gone.jsonl"]) == 2
    assert capsys.readouterr().err == "prepare: gone.jsonl does not exist.\n"


def test_captions_get_their_question(file, capsys):
    file.write_text(json.dumps({"image": "red.png", "caption": "a red square."}))
    assert main(["prepare", "conversations", "talk.jsonl", "--question", "what is it?"]) == 0
    assert "Question: what is it? Answer:⟦ a red square.</s>⟧" in capsys.readouterr().out
