"""Reading lines of JSON."""

import json

import pytest

from equipoise.pipelines.files import json_lines


def test_lines_end_in_line_breaks_alone_and_each_wrong_one_is_given(tmp_path):
    file, text = tmp_path / "a.jsonl", "one\u2028two\x85three"
    lines = [json.dumps({"text": text}, ensure_ascii=False), "", "{", "[1, 2]", "nothing"]
    file.write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    found = list(json_lines(file))
    assert [number for number, _ in found] == [1, 3, 4, 5]
    assert found[0][1] == {"text": text} and found[2][1] == [1, 2]
    assert all(isinstance(found[index][1], ValueError) for index in (1, 3))


def test_what_is_no_text_says_where_in_the_file(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 1}\n\xff')
    with pytest.raises(UnicodeDecodeError) as refused:
        list(json_lines(file))
    assert refused.value.start == 9
