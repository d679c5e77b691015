"""Prompts become the ids that transformers gives them, padded, and cut in the open."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest

from qjax.models.text_encoders.tokenizers import encode_prompts, load_tokenizer

pytest.importorskip("transformers")

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = ["c a", "ca t</w>", "d o", "do g</w>", "a n", "an d</w>"]
T = 77
PROMPTS = [
    "",
    "cat",
    "Cats AND\n dogs,  and a naïve fox's 1234 toys",
    "wow! !! !!!",
    f"cat{END}dog {START} and",
    "cat and dog " * 30,
]
# What the folders of Stable Diffusion hold: pad token of tokenizer_config.json and of
# special_tokens_map.json, whether the first lists added tokens, and the pad token in the end.
LAYOUTS = {
    "sd1": (END, END, False, END),
    "sd2": (END, "!", False, "!"),
    "xl_second": ("!", "!", True, "!"),
    "newest": ("!", None, True, "!"),
}


def added(token: str, **fields) -> dict:
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"content": token} | flags | fields


def vocabulary() -> list[str]:
    """Every byte within and at the end of a word, the merges, and the two special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())  # "!" comes first and gets id 0, as in CLIP
    words = [merge.replace(" ", "") for merge in MERGES]
    return [*letters, *(letter + "</w>" for letter in letters), *words, START, END]


def write_tokenizer(folder, layout="sd1", **changes):
    """A folder in one of the layouts; `changes` to its config, None to take a key out."""
    in_config, in_map, lists_added, _ = LAYOUTS[layout]
    tokens = vocabulary()
    ids = {token: i for i, token in enumerate(tokens)}
    special = {"bos_token": START, "eos_token": END, "unk_token": END}
    config = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": T,
        "pad_token": in_config,
        "tokenizer_class": "CLIPTokenizer",
    }
    if lists_added:
        listed = {ids[token]: added(token, special=True) for token in ("!", START, END)}
        config |= special | {"added_tokens_decoder": listed}
    else:
        config |= {k: {"__type": "AddedToken", **added(v)} for k, v in special.items()}
    config = {k: v for k, v in (config | changes).items() if v is not None}
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    if in_map is not None:
        pads = {k: added(v) for k, v in special.items()} | {"pad_token": in_map}
        (folder / "special_tokens_map.json").write_text(json.dumps(pads))
    return folder


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture
def folder(tmp_path, layout):
    return write_tokenizer(tmp_path / "tokenizer", layout)


@pytest.fixture
def tokenizer(tmp_path):
    return load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))


def encode_in_silence(tokenizer, prompts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return encode_prompts(tokenizer, prompts)


def test_ids_are_those_of_transformers(folder):
    """As diffusers' pipelines call it."""
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(str(folder))
    expected = theirs(PROMPTS, padding="max_length", max_length=T, truncation=True)["input_ids"]
    ids = encode_in_silence(load_tokenizer(folder), PROMPTS)
    assert ids.dtype == np.int32 and ids.shape == (len(PROMPTS), T)
    assert ids.tolist() == expected


def test_padding_is_the_token_of_the_model(folder, layout):
    tokens = vocabulary()
    pad = tokens.index(LAYOUTS[layout][-1])
    empty, cat = encode_prompts(load_tokenizer(folder), ["", "cat"]).tolist()
    start, end, word = (tokens.index(token) for token in (START, END, "cat</w>"))
    assert empty == [start, end] + [pad] * (T - 2)
    assert cat == [start, word, end] + [pad] * (T - 3)


def test_an_exclamation_mark_is_padding_where_it_pads(folder, layout):
    tokens = vocabulary()
    (ids,) = encode_prompts(load_tokenizer(folder), ["cat!"]).tolist()
    mark = "!" if LAYOUTS[layout][-1] == "!" else "!</w>"
    assert ids[1:3] == [tokens.index("cat</w>"), tokens.index(mark)]


def test_folders_that_transformers_has_saved_anew_give_the_same_ids(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    tokenizer.save_pretrained(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "tokenizer.json").exists()
    (tmp_path / "saved" / "vocab.json").unlink(missing_ok=True)
    saved = load_tokenizer(tmp_path, "saved")
    ids = encode_in_silence(tokenizer, PROMPTS)
    assert np.array_equal(encode_in_silence(saved, PROMPTS), ids)


def test_every_long_prompt_is_named_with_what_it_loses(tokenizer):
    fits, longer = "cat " * 75, "cat " * 75 + "Dog"
    much_longer = "dog " * 74 + "cat and cat and dog"
    with pytest.warns(UserWarning) as record:
        ids = encode_prompts(tokenizer, [fits, longer, "", much_longer])
    (warning,) = record
    assert "2 of 4 are longer" in str(warning.message)
    assert "prompt 1 loses 'dog', prompt 3 loses 'and cat and dog'." in str(warning.message)
    assert warning.filename == __file__
    assert np.array_equal(ids[0], ids[1])
    assert ids[3, -1] == vocabulary().index(END)


def test_prompts_that_fit_cause_no_warning(tokenizer):
    encode_prompts(tokenizer, ["", "cat " * 75])


def test_the_length_is_the_tokenizers(tmp_path):
    folder = write_tokenizer(tmp_path / "short", model_max_length=8)
    with pytest.warns(UserWarning, match=r"may have 8 tokens.*prompt 0 loses 'cat cat'"):
        ids = encode_prompts(load_tokenizer(folder), ["cat " * 8])
    assert ids.shape == (1, 8)


def test_prompts_that_are_no_list_of_texts_raise(tokenizer):
    with pytest.raises(TypeError, match=r"got 'a cat'\. Write \[prompt\]"):
        encode_prompts(tokenizer, "a cat")
    with pytest.raises(TypeError, match="got 3 at 1, None at 2"):
        encode_prompts(tokenizer, ["a cat", 3, None])
    with pytest.raises(ValueError, match="at least one text"):
        encode_prompts(tokenizer, [])


def test_folders_that_are_not_whole_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        load_tokenizer(tmp_path, "tokenizer_2")
    folder = write_tokenizer(tmp_path / "tokenizer")
    (folder / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"; merges\.txt not found"):
        load_tokenizer(folder)
    (folder / "vocab.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"; vocab\.json and merges\.txt not found"):
        load_tokenizer(folder)
    folder = write_tokenizer(tmp_path / "tokenizer")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer_config\.json is missing"):
        load_tokenizer(folder)


def test_folders_of_other_tokenizers_raise(tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer", tokenizer_class="T5Tokenizer")
    with pytest.raises(ValueError, match="CLIPTokenizer or CLIPTokenizerFast; got 'T5Tokenizer'"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_tokenizer(folder)


def test_a_tokenizer_without_a_length_raises(tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer", model_max_length=None)
    with pytest.raises(ValueError, match="Set model_max_length"):
        load_tokenizer(folder)


def test_a_tokenizer_without_padding_raises(tokenizer):
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="must have a token for padding, and CLIPTokenizer"):
        encode_prompts(tokenizer, ["cat"])


def test_torch_is_not_needed(tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer", "sd2")
    lines = [
        "import sys",
        "sys.modules['torch'] = None",
        "from qjax.models.text_encoders.tokenizers import encode_prompts, load_tokenizer",
        "assert 'transformers' not in sys.modules",
        f"ids = encode_prompts(load_tokenizer({str(folder)!r}), ['cat and dog'])",
        "assert sys.modules['torch'] is None",
        "print(ids[0, :6].tolist())",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )
    tokens = vocabulary()
    expected = [tokens.index(t) for t in (START, "cat</w>", "and</w>", "dog</w>", END, "!")]
    assert (done.returncode, done.stdout.strip()) == (0, str(expected)), done.stderr
