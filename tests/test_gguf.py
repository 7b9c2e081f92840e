"""GGUF files: the numbers of the format's definition, and a clear error for any other file."""

import pathlib
import struct

import nearpeak
import pytest
import torch
from gguf_blocks import one_by_one, random_blocks
from inputs import randn
from nearpeak.linear.gguf_blocks import TYPES

ROWS, WIDTH = 3, 512


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def metadata(alignment):
    values = [
        string("general.architecture") + struct.pack("<I", 8) + string("toy"),
        string("general.alignment") + struct.pack("<II", 4, alignment),
        string("toy.words") + struct.pack("<IIQ", 9, 8, 2) + string("a") + string("bc"),
        string("toy.scores") + struct.pack("<IIQ3f", 9, 6, 3, 1, 2, 3),
        string("toy.flag") + struct.pack("<IB", 7, 1),
    ]
    return len(values), b"".join(values)


FLOATS = {"plain": (0, torch.float32), "half": (1, torch.float16), "brain": (30, torch.bfloat16)}
UNKNOWN = "ternary", 34


def floats_of(name):
    return randn(ROWS, WIDTH, dtype=FLOATS[name][1], seed=FLOATS[name][0])


def contents():
    """The type and bytes of every tensor of the toy file; one is of a type that is not read."""
    for name, (number, _) in FLOATS.items():
        yield name, number, bytes(floats_of(name).view(torch.uint8).flatten().tolist())
    yield *UNKNOWN, bytes(7)
    for kind, block in TYPES.items():
        yield kind, block.number, bytes(random_blocks(kind, ROWS, WIDTH).flatten().tolist())


def file_of(version=3, magic=b"GGUF", alignment=32, shape=(WIDTH, ROWS)):
    count, values = metadata(alignment)
    described, body, tensors = b"", b"", 0
    for name, number, content in contents():
        body += bytes(-len(body) % alignment)
        described += string(name) + struct.pack("<IQQIQ", 2, *shape, number, len(body))
        body += content
        tensors += 1
    head = magic + struct.pack("<IQQ", version, tensors, count) + values + described
    return head + bytes(-len(head) % alignment) + body


@pytest.fixture
def written(tmp_path):
    def write(content):
        path = tmp_path / "toy.gguf"
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 32, 128])
def test_tensors_are_the_files_numbers(written, version, alignment):
    tensors = nearpeak.read_gguf(written(file_of(version, alignment=alignment)))
    assert list(tensors) == [*FLOATS, *TYPES]
    for name in FLOATS:
        assert torch.equal(tensors[name], floats_of(name))
    for kind in TYPES:
        weight, blocks = tensors[kind], random_blocks(kind, ROWS, WIDTH)
        assert (weight.kind, weight.out_features, weight.in_features) == (kind, ROWS, WIDTH)
        assert torch.equal(weight.blocks, blocks)
        x = randn(2, WIDTH)
        expected = x.double() @ one_by_one(kind, blocks).mT
        torch.testing.assert_close(nearpeak.quantized_linear(x, weight).double(), expected, rtol=1e-4, atol=1e-3)


def test_the_file_is_mapped_and_stays_what_it_is(written):
    path = written(file_of())
    tensors = nearpeak.read_gguf(path)
    assert len({tensors[kind].blocks.untyped_storage().data_ptr() for kind in TYPES}) == 1
    tensors["Q8_0"].blocks.zero_()
    assert path.read_bytes() == file_of()


def test_names_choose(written):
    path = written(file_of())
    assert list(nearpeak.read_gguf(path, names=["Q8_0", "plain"])) == ["Q8_0", "plain"]
    for name in (UNKNOWN[0], "absent"):
        with pytest.raises(ValueError, match=f"holds no tensor '{name}' of a type that is read"):
            nearpeak.read_gguf(str(path), names=[name])


def test_as_the_gguf_package_writes_them(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "theirs.gguf"
    writer, floats = gguf.GGUFWriter(path, "toy"), randn(5, 64).numpy()
    kinds = ("Q4_0", "Q5_0", "Q8_0")
    for kind in kinds:
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(kind, gguf.quantize(floats, number), raw_dtype=number)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    for kind in kinds:
        number = gguf.GGMLQuantizationType[kind]
        theirs = gguf.dequantize(gguf.quantize(floats, number), number)
        assert torch.equal(nearpeak.read_gguf(path)[kind].dequantize(), torch.from_numpy(theirs))


def test_a_file_cut_off_anywhere_is_refused(written):
    content = file_of()
    for length in [*range(0, 600, 7), *range(600, len(content), 397), len(content) - 1]:
        with pytest.raises(ValueError, match=r"is no GGUF file that can be read: it (ends before|does not begin)"):
            nearpeak.read_gguf(written(content[:length]))


WRONG = {
    "magic": (lambda: file_of(magic=b"GGML"), "does not begin with GGUF"),
    "big_endian": (lambda: file_of(version=3 << 24), "version"),
    "old": (lambda: file_of(version=1), "version 1"),
    "alignment": (lambda: file_of(alignment=24), "alignment 24 is not a power of two"),
    "half_blocks": (lambda: file_of(shape=(48, 6)), "no whole blocks"),
    "part_of_a_block": (lambda: file_of(shape=(32, 6)), "no whole blocks of 256"),
    "no_rows": (lambda: file_of(shape=(512, 0)), "no whole blocks"),
    "huge": (lambda: file_of(shape=(2**40, 2**40)), "it ends before tensor 'plain'"),
    "many_values": (lambda: _patched(16, struct.pack("<Q", 2**60)), "it ends before|unknown type"),
    "value_type": (lambda: file_of().replace(b"architecture\x08", b"architecture\x63"), "unknown type 99"),
    "name": (lambda: file_of().replace(b"toy.words", b"toy.\xff\xfe\xfd\xfcs"), "is not UTF-8"),
    "scale": (lambda: file_of()[:-2] + b"\x00\x7c", "tensor 'Q6_K' has scales that are not finite"),
}  # fmt: skip


def _patched(position, content):
    stored = file_of()
    return stored[:position] + content + stored[position + len(content) :]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_corrupt_file_is_refused(written, wrong):
    content, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        nearpeak.read_gguf(written(content()))


def test_dimensions_are_bounded(written):
    described = string("plain") + struct.pack("<I", 2)
    with pytest.raises(ValueError, match="has 99 dimensions"):
        nearpeak.read_gguf(written(file_of().replace(described, string("plain") + struct.pack("<I", 99))))


def test_no_file_is_an_operating_system_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        nearpeak.read_gguf(pathlib.Path(tmp_path, "absent.gguf"))
