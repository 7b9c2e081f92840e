"""Quantised matrices of GGUF files: the numbers of the format's definition, and a clear error for any other file."""

import pathlib
import struct

import nearpeak
import pytest
import torch
from inputs import randn

Q4_0, Q8_0, F32 = 2, 8, 0
ROWS, WIDTH = 3, 96


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


def blocks_of(kind):
    """Random blocks, and the weight they stand for, code by code as the format defines it."""
    generator = torch.Generator().manual_seed(kind)
    scales = randn(ROWS, WIDTH // 32, seed=kind).half()
    stored, weight = bytearray(), torch.empty(ROWS, WIDTH, dtype=torch.float64)
    for row in range(ROWS):
        for block in range(WIDTH // 32):
            scale = scales[row, block]
            stored += struct.pack("<e", float(scale))
            count = 32 if kind == Q8_0 else 16
            codes = torch.randint(0, 256, (count,), generator=generator).tolist()
            stored += bytes(codes)
            for i in range(32):
                if kind == Q8_0:
                    code = codes[i] - 256 if codes[i] > 127 else codes[i]
                else:
                    code = (codes[i] & 15 if i < 16 else codes[i - 16] >> 4) - 8
                weight[row, 32 * block + i] = float(scale) * code
    return bytes(stored), weight


def file_of(version=3, magic=b"GGUF", alignment=32, shape=(WIDTH, ROWS)):
    """A file of a Q4_0, a float32 and a Q8_0 tensor."""
    count, values = metadata(alignment)
    stored = {"four": (Q4_0, blocks_of(Q4_0)[0]), "plain": (F32, bytes(4 * ROWS * WIDTH))}
    stored["eight"] = (Q8_0, blocks_of(Q8_0)[0])
    described, body = b"", b""
    for name, (kind, content) in stored.items():
        body += bytes(-len(body) % alignment)
        described += string(name) + struct.pack("<IQQIQ", 2, *shape, kind, len(body))
        body += content
    head = magic + struct.pack("<IQQ", version, len(stored), count) + values + described
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
def test_weights_are_the_files_numbers(written, version, alignment):
    weights = nearpeak.read_gguf(written(file_of(version, alignment=alignment)))
    assert list(weights) == ["four", "eight"]
    for name, kind in (("four", Q4_0), ("eight", Q8_0)):
        weight = weights[name]
        assert (weight.out_features, weight.in_features, weight.group_size) == (ROWS, WIDTH, 32)
        assert torch.equal(weight.dequantize(torch.float64), blocks_of(kind)[1])
        x = randn(2, WIDTH)
        expected = x.double() @ blocks_of(kind)[1].mT
        torch.testing.assert_close(nearpeak.quantized_linear(x, weight).double(), expected, rtol=1e-4, atol=1e-3)


def test_names_choose(written):
    path = written(file_of())
    assert list(nearpeak.read_gguf(path, names=["eight"])) == ["eight"]
    for name in ("plain", "absent"):
        with pytest.raises(ValueError, match=f"holds no matrix '{name}'"):
            nearpeak.read_gguf(str(path), names=[name])


def test_as_the_gguf_package_reads_them(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "theirs.gguf"
    writer, floats = gguf.GGUFWriter(path, "toy"), randn(5, 64).numpy()
    kinds = {"four": gguf.GGMLQuantizationType.Q4_0, "eight": gguf.GGMLQuantizationType.Q8_0}
    for name, kind in kinds.items():
        writer.add_tensor(name, gguf.quantize(floats, kind), raw_dtype=kind)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    for name, kind in kinds.items():
        theirs = gguf.dequantize(gguf.quantize(floats, kind), kind)
        assert torch.equal(nearpeak.read_gguf(path)[name].dequantize(), torch.from_numpy(theirs))


def test_a_file_cut_off_anywhere_is_refused(written):
    content = file_of()
    for length in [*range(0, 400, 7), *range(400, len(content), 97), len(content) - 1]:
        with pytest.raises(ValueError, match=r"is no GGUF file that can be read: it (ends before|does not begin)"):
            nearpeak.read_gguf(written(content[:length]))


WRONG = {
    "magic": (lambda: file_of(magic=b"GGML"), "does not begin with GGUF"),
    "big_endian": (lambda: file_of(version=3 << 24), "version"),
    "old": (lambda: file_of(version=1), "version 1"),
    "alignment": (lambda: file_of(alignment=24), "alignment 24 is not a power of two"),
    "half_blocks": (lambda: file_of(shape=(48, 6)), "no whole blocks"),
    "no_rows": (lambda: file_of(shape=(32, 0)), "no whole blocks"),
    "huge": (lambda: file_of(shape=(2**40, 2**40)), "it ends before tensor 'four'"),
    "many_values": (lambda: _patched(16, struct.pack("<Q", 2**60)), "it ends before|unknown type"),
    "value_type": (lambda: file_of().replace(b"architecture\x08", b"architecture\x63"), "unknown type 99"),
    "name": (lambda: file_of().replace(b"toy.words", b"toy.\xff\xfe\xfd\xfcs"), "is not UTF-8"),
    "scale": (lambda: file_of()[: -len(blocks_of(Q8_0)[0])] + b"\x00\x7c" + blocks_of(Q8_0)[0][2:], "not finite"),
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
    described = string("four") + struct.pack("<I", 2)
    with pytest.raises(ValueError, match="has 99 dimensions"):
        nearpeak.read_gguf(written(file_of().replace(described, string("four") + struct.pack("<I", 99))))


def test_no_file_is_an_operating_system_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        nearpeak.read_gguf(pathlib.Path(tmp_path, "absent.gguf"))
