"""The safetensors reader refuses what is wrong, and the writer leaves nothing half done."""

import json
import os
import struct
from pathlib import Path
from tempfile import TemporaryDirectory

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.core.safetensors_io import atomic_write, metadata, open_tensors, write_tensors

DTYPES = [
    np.bool_,
    np.uint8,
    np.uint16,
    np.uint32,
    np.uint64,
    np.int8,
    np.int16,
    np.int32,
    np.int64,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
    ml_dtypes.bfloat16,
    np.float16,
    np.float32,
    np.float64,
]
SMALL = {
    "blocks_0/kernel": np.arange(6, dtype=np.float16).reshape(2, 3),
    "bias": np.arange(3, dtype=np.float32),
    "codes": np.arange(5, dtype=np.uint8),
    "empty": np.zeros((0, 4), np.int64),
}


@st.composite
def arrays(draw) -> np.ndarray:
    """An array of any dtype the format has, with any bits in it."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    n = int(np.prod(shape)) * dtype.itemsize
    raw = np.frombuffer(draw(st.binary(min_size=n, max_size=n)), np.uint8)
    raw = raw % 2 if dtype == np.bool_ else raw
    return raw.copy().view(dtype).reshape(shape)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
    lambda name: name != "__metadata__"
)
tensor_dicts = st.dictionaries(names, arrays(), max_size=5)
quick = settings(deadline=None, max_examples=60)


def same_tensors(a, b) -> bool:
    """Equal names, shapes, dtypes and bits."""
    return a.keys() == b.keys() and all(
        a[k].shape == b[k].shape and a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes()
        for k in a
    )


def read_all(path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in open_tensors(path).items()}


def write_raw(path, header, data=b"") -> None:
    """A file with this header, which may be text, bytes or an object, and these bytes."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def entry(dtype="U8", shape=(2,), begin=0, end=2):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@quick
@given(tensor_dicts, st.dictionaries(names, names, max_size=3))
def test_what_is_written_is_read(tensors, text):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        write_tensors(path, tensors, text)
        assert same_tensors(read_all(path), tensors)
        assert metadata(path) == text


@quick
@given(tensor_dicts)
def test_files_are_equal_whatever_the_order_of_the_mapping(tensors):
    with TemporaryDirectory() as folder:
        a, b = Path(folder) / "a", Path(folder) / "b"
        write_tensors(a, tensors, {"x": "1", "y": "2"})
        write_tensors(b, dict(reversed(tensors.items())), {"y": "2", "x": "1"})
        assert a.read_bytes() == b.read_bytes()


@quick
@given(tensor_dicts)
def test_the_official_package_reads_our_files(tensors):
    # Its NumPy reader has no bfloat16 or float8, so those are compared as integers.
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        write_tensors(path, tensors, {"format": "pt"})
        with safetensors.safe_open(path, framework="numpy") as file:
            assert set(file.keys()) == tensors.keys()
            assert file.metadata()["format"] == "pt"
        for name, raw in safetensors.deserialize(path.read_bytes()):
            assert tuple(raw["shape"]) == tensors[name].shape
            assert bytes(raw["data"]) == tensors[name].tobytes()


@quick
@given(tensor_dicts)
def test_we_read_files_of_the_official_package(tensors):
    tensors = {k: v for k, v in tensors.items() if v.dtype.isbuiltin == 1}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        safetensors.numpy.save_file(dict(tensors), path, metadata={"a": "b"})
        assert same_tensors(read_all(path), tensors)
        assert metadata(path) == {"a": "b"}


def test_every_truncation_is_refused(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    write_tensors(whole, SMALL, {"format": "pt"})
    raw = whole.read_bytes()
    for length in range(len(raw)):
        cut.write_bytes(raw[:length])
        with pytest.raises(ValueError, match="cut"):
            open_tensors(cut)


def test_a_longer_file_is_refused(tmp_path):
    path = tmp_path / "a"
    write_tensors(path, SMALL)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="must fill the file"):
        open_tensors(path)


def refused_or_the_same(path, raw: bytes) -> bool:
    """Whether a reader of `raw` either gets a plain ValueError or exactly `SMALL`."""
    path.write_bytes(raw)
    try:
        return same_tensors(read_all(path), SMALL)
    except ValueError as error:
        return type(error) is ValueError and str(path) in str(error)


def test_every_flipped_header_bit_is_refused_or_harmless(tmp_path):
    path = tmp_path / "a"
    write_tensors(path, SMALL, {"format": "pt"})
    raw = path.read_bytes()
    for position in range(8 + struct.unpack("<Q", raw[:8])[0]):
        for bit in range(8):
            bad = bytearray(raw)
            bad[position] ^= 1 << bit
            assert refused_or_the_same(path, bytes(bad)), (position, bit)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_corrupted_header_byte_is_refused_or_harmless(data):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        write_tensors(path, SMALL, {"format": "pt"})
        raw = bytearray(path.read_bytes())
        position = data.draw(st.integers(0, 7 + struct.unpack("<Q", raw[:8])[0]))
        raw[position] = data.draw(st.integers(0, 255))
        assert refused_or_the_same(path, bytes(raw))


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=64), st.binary(max_size=16))
def test_random_headers_are_refused_or_empty(header, data):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        write_raw(path, b"{" + header, data)
        try:
            assert dict(open_tensors(path)) == {}
        except ValueError as error:
            assert type(error) is ValueError


@pytest.mark.parametrize(
    ("header", "data", "match"),
    [
        ("[]", b"", "must begin with"),
        (" {}", b"", "must begin with"),
        ("{", b"", "one JSON object"),
        ("{}{}", b"", "one JSON object"),
        (b'{"\xff": 1}', b"", "one JSON object"),
        ('{"\\ud800": 1}', b"", "one JSON object"),
        ('{"a": NaN}', b"", "NaN, which JSON does not have"),
        ('{"a": ' + "9" * 5000 + "}", b"", "one JSON object"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", b"", "one JSON object"),
        ('{"a": ' + "[" * 900 + "]" * 900 + "}", b"", "tensor 'a' must have exactly"),
        ('{"a": 1, "b": 2, "a": 3}', b"", "key 'a' twice"),
        ('{"a": {"dtype": "U8", "dtype": "I8"}}', b"", "key 'dtype' twice"),
        ({"a": 3}, b"", "tensor 'a' must have exactly dtype, shape and data_offsets"),
        ({"a": {"dtype": "U8", "shape": [0]}}, b"", "tensor 'a' must have exactly"),
        ({"a": entry() | {"note": 1}}, b"ab", "tensor 'a' must have exactly"),
        ({"a": entry(dtype="F4")}, b"ab", "tensor 'a' has a dtype .* got 'F4'"),
        ({"a": entry(dtype=["U8"])}, b"ab", "tensor 'a' has a dtype"),
        ({"a": entry(shape=(-2,))}, b"ab", "tensor 'a' must have a shape"),
        ({"a": entry(shape=(2.0,))}, b"ab", "tensor 'a' must have a shape"),
        ({"a": entry(shape=(True, 2))}, b"ab", "tensor 'a' must have a shape"),
        ({"a": entry() | {"shape": "2"}}, b"ab", "tensor 'a' must have a shape"),
        ({"a": entry(shape=(1,) * 65, end=1)}, b"a", "at most 64"),
        ({"a": entry(shape=(0, 2**62, 2**62), end=0)}, b"", "larger than any array"),
        ({"a": entry(shape=(2**70,))}, b"ab", "tensor 'a' must have a shape"),
        ({"a": entry() | {"data_offsets": [0]}}, b"ab", "must have data_offsets"),
        ({"a": entry(begin=2, end=0)}, b"ab", "must have data_offsets"),
        ({"a": entry(begin=-2, end=0)}, b"ab", "must have data_offsets"),
        ({"a": entry(shape=(3,))}, b"ab", "3 bytes, in a range of 2"),
        ({"a": entry(dtype="F32")}, b"ab", "8 bytes, in a range of 2"),
        ({"a": entry(shape=(3,), end=3)}, b"ab", "must end inside the file"),
        ({"a": entry(begin=1, end=3)}, b"abc", "without overlap or hole"),
        ({"a": entry(), "b": entry(begin=1, end=3)}, b"abc", "'b' at byte 1 of the data, 2"),
        ({"a": entry(), "b": entry(begin=3, end=5)}, b"abcde", "'b' at byte 3 of the data, 2"),
        ({"a": entry()}, b"abc", "must fill the file"),
        ({"__metadata__": {"a": 1}}, b"", "must map text to text"),
        ({"__metadata__": []}, b"", "must map text to text"),
        ({"__metadata__": {"qjax.header_sha256": "0"}}, b"", "does not match its digest"),
    ],
)
def test_broken_files_are_refused_by_rule_and_name(tmp_path, header, data, match):
    path = tmp_path / "broken.safetensors"
    write_raw(path, header, data)
    with pytest.raises(ValueError, match=match) as caught:
        open_tensors(path)
    assert type(caught.value) is ValueError
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_header_length_beyond_the_limit_is_refused_without_allocating(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(ValueError, match="header of 9223372036854775808 bytes"):
        open_tensors(path)


def test_a_boolean_byte_that_is_neither_0_nor_1_is_refused(tmp_path):
    path = tmp_path / "a"
    write_raw(path, {"flag": entry(dtype="BOOL")}, b"\x01\x02")
    with pytest.raises(ValueError, match="'flag' is BOOL and holds the byte 2"):
        open_tensors(path)["flag"].read()


def test_a_file_that_shrinks_after_opening_is_an_error_not_a_crash(tmp_path):
    path = tmp_path / "a"
    write_tensors(path, {"w": np.ones(1000, np.float32)})
    tensor = open_tensors(path)["w"]
    os.truncate(path, 500)
    with pytest.raises(ValueError, match="'w' ends beyond the file"):
        tensor.read()


def test_open_tensors_keep_their_values_when_the_file_is_replaced(tmp_path):
    path = tmp_path / "a"
    write_tensors(path, SMALL)
    lazy = open_tensors(path)
    write_tensors(path, {"other": np.zeros(1, np.int8)})
    assert same_tensors({k: v.read() for k, v in lazy.items()}, SMALL)


def test_read_gives_a_fresh_writable_array(tmp_path):
    path = tmp_path / "a"
    write_tensors(path, SMALL)
    tensor = open_tensors(path)["bias"]
    tensor.read()[:] = 7
    np.testing.assert_array_equal(tensor.read(), SMALL["bias"])
    assert tensor.nbytes == 12
    with pytest.raises(ValueError, match="copy=False"):
        np.array(tensor, copy=False)


def test_lazy_tensors_and_jax_arrays_can_be_written(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    write_tensors(a, {"w": jnp.arange(4, dtype=jnp.bfloat16), "v": np.arange(3, dtype=">f4")})
    write_tensors(b, open_tensors(a))
    assert a.read_bytes() == b.read_bytes()
    assert read_all(b)["v"].tolist() == [0.0, 1.0, 2.0]


def test_non_contiguous_arrays_are_written_by_value(tmp_path):
    w = np.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path / "a", {"t": w.T, "s": w[::2, ::2]})
    tensors = read_all(tmp_path / "a")
    np.testing.assert_array_equal(tensors["t"], w.T)
    np.testing.assert_array_equal(tensors["s"], w[::2, ::2])


def test_tensors_are_aligned_to_their_dtype(tmp_path):
    write_tensors(tmp_path / "a", {"a": np.zeros(3, np.uint8), "b": np.zeros(2, np.float64)})
    raw = (tmp_path / "a").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert header["b"]["data_offsets"] == [0, 16]


def test_the_callers_dict_is_not_touched(tmp_path):
    w = jnp.ones((2,))
    tensors = {"w": w}
    write_tensors(tmp_path / "a", tensors)
    assert tensors == {"w": w} and tensors["w"] is w


class Broken:
    """Announces a tensor and then fails to give it, or gives another."""

    shape = (2,)
    dtype = np.dtype(np.float32)

    def __init__(self, value=None):
        self.value = value

    def __array__(self, dtype=None, copy=None):
        if self.value is None:
            raise RuntimeError("the device went away")
        return self.value


@pytest.mark.parametrize(
    ("tensors", "text", "error", "match"),
    [
        ({"w": np.ones(2, ml_dtypes.int4)}, {}, ValueError, "'w' must have one .* got int4"),
        ({"w": np.array(["a"])}, {}, ValueError, "'w' must have one of the dtypes"),
        ({"__metadata__": np.ones(2)}, {}, ValueError, "__metadata__"),
        ({"\ud800": np.ones(2)}, {}, ValueError, "valid Unicode"),
        ({1: np.ones(2)}, {}, TypeError, "must be text; got 1"),
        ({"w": np.ones(2)}, {"bits": 4}, TypeError, "must be text; got 4"),
        ({"a": np.ones(2), "w": Broken()}, {}, RuntimeError, "went away"),
        ({"a": np.ones(2), "w": Broken(np.ones(3, np.float32))}, {}, ValueError, "announced"),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, tensors, text, error, match):
    path = tmp_path / "a"
    write_tensors(path, SMALL)
    before = path.read_bytes()
    with pytest.raises(error, match=match):
        write_tensors(path, tensors, text)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_appears_only_at_the_end(tmp_path):
    path = tmp_path / "a"
    with atomic_write(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_reported_as_such(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_tensors(tmp_path / "none.safetensors")
