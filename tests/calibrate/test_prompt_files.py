"""Prompts come out of the formats that benchmarks publish them in, or the file is named."""

import json

import pytest

from qjax.calibrate.prompt_files import read_prompts


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return path


def test_lines_of_a_text_are_prompts_but_for_empty_ones_and_comments(tmp_path):
    path = write(tmp_path, "prompts.txt", "# comment\na cat\n\n  a dog \n")
    assert read_prompts(path) == ("a cat", "a dog")


def test_a_table_gives_its_column_of_prompts(tmp_path):
    head = "Prompt\tCategory\tChallenge\tNote\n"
    rows = '"bond"\tAbstract\tBasic\t\n# 1, a "cat"\tAnimals\tBasic\tx\n'
    assert read_prompts(write(tmp_path, "parti.tsv", head + rows)) == ('"bond"', '# 1, a "cat"')
    table = 'id,CAPTION\n1,"a cat, a dog\nand a fox"\n2,a hen\n'
    assert read_prompts(write(tmp_path, "p.csv", table)) == ("a cat, a dog\nand a fox", "a hen")
    assert read_prompts(write(tmp_path, "b.tsv", "\ufefftext\na cat\n")) == ("a cat",)


def test_coco_gives_the_first_caption_of_each_picture_by_its_id(tmp_path):
    annotations = [
        {"image_id": 9, "id": 4, "caption": "a late one"},
        {"image_id": 9, "id": 2, "caption": "a dog\n"},
        {"image_id": 3, "id": 7, "caption": "a cat "},
    ]
    path = write(tmp_path, "captions_val2014.json", {"images": [], "annotations": annotations})
    assert read_prompts(path) == ("a cat", "a dog")


@pytest.mark.parametrize(
    "data",
    [
        ["a cat", "a dog"],
        [{"Prompt": "a cat"}, {"caption": "a dog"}],
        {"f0": {"category": "x", "prompt": "a cat"}, "f1": {"category": "y", "prompt": "a dog"}},
    ],
)
def test_lists_and_dicts_of_json_give_their_texts(tmp_path, data):
    assert read_prompts(write(tmp_path, "prompts.json", data)) == ("a cat", "a dog")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n", "must hold at least one prompt"),
        ("p.json", "[]", "must hold at least one prompt"),
        ("p.tsv", "a\tb\n1\t2\n", "column prompt, caption, text; its head is a, b"),
        ("p.tsv", "a\tprompt\n1\n", "row 2, has no column 'prompt'"),
        ("p.tsv", "", "its head is empty"),
        ("p.json", "[1", "must be JSON"),
        ("p.json", '"a"', "must hold a list"),
        ("p.json", '["a", {"b": 1}]', "entry 1"),
        ("p.json", '{"annotations": [{"caption": "a"}]}', "image_id, id and caption"),
    ],
)
def test_a_file_that_is_not_what_its_ending_says_is_named(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        read_prompts(write(tmp_path, name, text))


def test_another_encoding_is_refused(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UTF-8"):
        read_prompts(path)
