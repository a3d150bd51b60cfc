"""Data of every kind become the right numbers, batch by batch, and what does not fit is refused with its place."""

import io
import sys
import zipfile
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from models import shared_data
from slimgraph.errors import ConfigError, DataError
from slimgraph.program.signature import Signature, TensorSpec
from slimgraph.training import npz
from slimgraph.training.data import Batch, ImageOptions, open_data


def takes(*inputs, classes=10):
    """Signature of a program with these inputs: (name, shape) or (name, shape, dtype)."""
    specs = (TensorSpec(name=name, shape=shape, dtype=(*dtype, torch.float32)[0]) for name, shape, *dtype in inputs)
    scores = TensorSpec(name="scores", shape=("batch", classes), dtype=torch.float32)
    return Signature(inputs=tuple(specs), outputs=(scores,))


VECTOR = takes(("x", ("batch", 4)))
PICTURE = takes(("x", ("batch", 3, 8, 8)))
TWO_CLASSES = takes(("x", ("batch", 3, 8, 8)), classes=2)
GREY = takes(("x", ("batch", 1, 8, 8)))


def save(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def everything(source):
    """All samples of a source as one batch."""
    batches = list(source)
    inputs = {name: torch.cat([batch.inputs[name] for batch in batches]) for name in batches[0].inputs}
    labelled = batches[0].labels is not None
    return Batch(inputs, torch.cat([batch.labels for batch in batches]) if labelled else None)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture
def numbers(tmp_path):
    """Ten samples of four numbers: sample i is i everywhere, its label is i."""
    x = np.repeat(np.arange(10, dtype=np.float32)[:, None], 4, axis=1)
    return save(tmp_path / "numbers.npz", x=x, label=np.arange(10))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes a module of this source importable as `my_batches`."""

    def write(source):
        (tmp_path / "my_batches.py").write_text(f"import numpy as np\nimport torch\n\n{source}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "my_batches", raising=False)
        return "my_batches:make"

    yield write
    sys.modules.pop("my_batches", None)


# Arrays


def test_arrays_come_in_batches_with_their_labels(numbers):
    source = open_data(numbers, VECTOR, batch_size=4)
    assert [batch.inputs["x"][:, 0].tolist() for batch in source] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [batch.labels.tolist() for batch in source] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(source) == source.samples == 10
    assert source.has_labels
    assert everything(source).labels.dtype == torch.int64


def test_a_source_begins_anew_each_time_and_in_two_places_at_once(numbers):
    source = open_data(numbers, VECTOR, batch_size=5)
    for one, other in zip(source, source, strict=True):
        assert torch.equal(one.inputs["x"], other.inputs["x"])
    assert len(list(source)) == 2


@pytest.mark.parametrize(
    ("suffix", "chosen"),
    [
        ("[:3]", [0, 1, 2]),
        ("[7:]", [7, 8, 9]),
        ("[2:5]", [2, 3, 4]),
        ("[-2:]", [8, 9]),
        ("[:-7]", [0, 1, 2]),
        ("[:]", list(range(10))),
        ("[8:100]", [8, 9]),
    ],
)
def test_a_suffix_chooses_samples_as_a_slice_does(numbers, suffix, chosen):
    source = open_data(numbers + suffix, VECTOR, batch_size=2)
    assert everything(source).labels.tolist() == chosen
    assert len(source) == len(chosen)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 20),
    batch_size=st.integers(1, 25),
    start=st.none() | st.integers(-25, 25),
    stop=st.none() | st.integers(-25, 25),
    limit=st.none() | st.integers(1, 25),
)
def test_whatever_is_chosen_comes_once_and_in_order(tmp_path_factory, count, batch_size, start, stop, limit):
    path = save(tmp_path_factory.mktemp("law") / "d.npz", x=np.arange(count, dtype=np.float32))
    signature = takes(("x", ("batch",)))
    chosen = list(range(count))[start:stop]
    spec = f"{path}[{'' if start is None else start}:{'' if stop is None else stop}]"
    if not chosen:
        with pytest.raises(DataError, match="no sample"):
            open_data(spec, signature)
        return
    source = open_data(spec, signature, batch_size=batch_size, limit=limit)
    batches = [batch.inputs["x"].int().tolist() for batch in source]
    seen = [number for batch in batches for number in batch]
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert set(seen) <= set(chosen)
    assert all(a < b for a, b in pairwise(seen))
    assert len(seen) == len(source) == min(len(chosen), limit or count)


def test_limit_draws_samples_by_its_seed(numbers):
    def drawn(seed):
        return everything(open_data(numbers, VECTOR, limit=4, seed=seed)).labels.tolist()

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert len(set(drawn(0))) == 4


def test_a_number_that_is_no_sample_goes_with_every_part_of_a_batch():
    batch = Batch({"factor": torch.tensor(2.0), "x": torch.arange(6.0).reshape(3, 2)}, torch.arange(3))
    assert len(batch) == 3
    part = batch[1:]
    assert (len(part), part.inputs["factor"].item(), part.inputs["x"].shape) == (2, 2.0, (2, 2))


def test_a_single_array_needs_no_name(tmp_path):
    path = save(tmp_path / "d.npz", whatever=np.ones((3, 4), np.float32))
    source = open_data(path, VECTOR)
    assert everything(source).inputs["x"].shape == (3, 4)
    assert not source.has_labels


def test_several_inputs_go_by_name_and_an_input_may_be_called_label(tmp_path):
    signature = takes(("label", ("batch", 2)), ("ids", ("batch", 3), torch.int64))
    path = save(
        tmp_path / "d.npz", ids=np.ones((5, 3), np.int32), label=np.zeros((5, 2), np.float32), labels=np.arange(5)
    )
    batch = everything(open_data(path, signature))
    assert batch.inputs["label"].shape == (5, 2)
    assert batch.inputs["ids"].dtype == torch.int64
    assert batch.labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", ["float64", "float16", ">f4"])
def test_floating_arrays_become_the_type_of_the_program(tmp_path, dtype):
    path = save(tmp_path / "d.npz", x=np.full((2, 4), 1.5, dtype))
    batch = everything(open_data(path, VECTOR))
    assert batch.inputs["x"].dtype == torch.float32
    assert (batch.inputs["x"] == 1.5).all()


def test_labels_in_a_column_are_class_numbers_and_floating_ones_stay(tmp_path):
    x = np.ones((3, 4), np.float32)
    column = open_data(save(tmp_path / "a.npz", x=x, labels=np.array([[1], [2], [3]], np.int32)), VECTOR)
    floating = open_data(save(tmp_path / "b.npz", x=x, labels=np.array([0.5, 99.0, -1.0])), VECTOR)
    assert everything(column).labels.tolist() == [1, 2, 3]
    assert everything(floating).labels.tolist() == [0.5, 99.0, -1.0]


def test_compressed_archives_are_read(tmp_path):
    np.savez_compressed(tmp_path / "deflated.npz", x=np.ones((3, 4), np.float32))
    with zipfile.ZipFile(tmp_path / "lzma.npz", "w", zipfile.ZIP_LZMA) as archive, archive.open("x.npy", "w") as member:
        np.save(member, np.ones((3, 4), np.float32))
    for name in ("deflated.npz", "lzma.npz"):
        assert len(open_data(str(tmp_path / name), VECTOR)) == 3


def test_a_program_with_a_fixed_batch_gets_just_that(numbers):
    signature = takes(("x", (5, 4)))
    assert [len(batch) for batch in open_data(numbers, signature, batch_size=3)] == [5, 5]
    with pytest.raises(DataError, match=r"8 samples.*exactly 5 at a time.*\[:5\]"):
        open_data(f"{numbers}[:8]", signature)


ONES = np.ones((3, 4), np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": ONES, "z": ONES}, r"array 'y'.*takes x: float32\[batch, 4\]"),
        ({"xx": ONES, "z": ONES, "labels": np.arange(3)}, "Closest: x"),
        ({"labels": np.arange(3)}, "no array for the input x"),
        ({"x": ONES[:, :3]}, r"float32\[3, 3\], but the program takes x: float32\[batch, 4\]"),
        ({"x": ONES[0]}, r"float32\[4\], but the program takes"),
        ({"x": ONES.astype(np.int64)}, r"int64\[3, 4\], but.*uint8 pictures.*store other numbers as float32"),
        ({"x": ONES.astype(np.uint8)}, "uint8 pictures"),
        ({"x": ONES.astype(bool)}, "bool"),
        ({"x": ONES.astype(complex)}, "complex128"),
        ({"x": ONES.astype(np.longdouble)}, r"float\d+\[3, 4\]"),
        ({"x": ONES.astype(str)}, "<U"),
        ({"x": ONES.astype(object)}, "'x' holds Python objects, which are never unpickled"),
        ({"x": np.float32(1)}, "first axis must count samples"),
        ({"x": ONES[:0]}, "no sample; there are 0 in all"),
        ({"x": ONES, "label": np.arange(2)}, r"3 samples, but labels of shape \[2\]"),
        ({"x": ONES, "label": np.int64(2)}, r"3 samples, but labels of shape \[\]"),
        ({"x": ONES, "label": np.array(["a", "b", "c"])}, "labels are <U1"),
        ({"x": ONES, "label": np.arange(3), "labels": np.arange(3)}, "both label and labels"),
        ({"x": ONES, "label": np.array([0, 10, 11])}, "sample 1 has label 10.*10 outputs.*0 to 9. 2 of 3"),
        ({"x": ONES, "label": np.array([0, 1, -1])}, "sample 2 has label -1"),
        ({"x": ONES, "label": np.array([0.0, np.nan, 1.0])}, "'label' of sample 1 is NaN"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, arrays, message):
    path = save(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message) as refused:
        open_data(path, VECTOR)
    assert "d.npz" in str(refused.value)


def test_unequal_numbers_of_samples_are_refused(tmp_path):
    path = save(tmp_path / "d.npz", a=np.ones((3, 2), np.float32), b=np.ones((4, 2), np.float32))
    with pytest.raises(DataError, match="3 of 'a', 4 of 'b'"):
        open_data(path, takes(("a", ("batch", 2)), ("b", ("batch", 2))))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_by_the_number_in_the_file(tmp_path, value):
    x = np.ones((10, 4), np.float32)
    x[7, 2] = value
    source = open_data(save(tmp_path / "d.npz", x=x) + "[3:]", VECTOR, batch_size=2)
    with pytest.raises(DataError, match="'x' of sample 7 is NaN or infinite"):
        list(source)


def test_the_first_batch_is_checked_when_the_data_is_opened(tmp_path):
    x = np.full((10, 4), np.nan, np.float32)
    with pytest.raises(DataError, match="'x' of sample 0"):
        open_data(save(tmp_path / "d.npz", x=x), VECTOR)


# Archives that nobody vouches for


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def archive(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return str(path)


NO_NPZ = r" as an \.npz file"


def test_files_that_are_no_archive_are_refused(tmp_path):
    path = tmp_path / "d.npz"
    for content, why in ((b"", ": the file is empty"), (b"not a zip file", NO_NPZ), (npy(ONES), NO_NPZ)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"d\.npz cannot be read{why}"):
            open_data(str(path), VECTOR)


def test_a_truncated_archive_is_refused(tmp_path):
    path = tmp_path / "d.npz"
    save(path, x=noise(100, 4).astype(np.float32))
    whole = path.read_bytes()
    for kept in (10, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:kept])
        with pytest.raises(DataError, match="cannot be read"):
            open_data(str(path), VECTOR)


def test_a_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "d.npz"
    save(path, x=noise(10_000, 4).astype(np.float32))
    content = bytearray(path.read_bytes())
    content[100_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        open_data(str(path), VECTOR)


def test_a_header_that_promises_more_than_is_stored_is_refused_before_memory_is_taken(tmp_path):
    header = npy(np.ones((3, 4), np.float32)).replace(b"(3, 4)", b"(3, 4" + b"0" * 15 + b")")
    path = archive(tmp_path / "d.npz", x=header)
    with pytest.raises(DataError, match="The file is damaged"):
        open_data(path, VECTOR)


def test_a_decompression_bomb_is_refused_and_small_zeros_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "LARGE", 2**16)
    monkeypatch.setattr(npz, "MOST_EXPANSION", 100)
    bomb = archive(tmp_path / "bomb.npz", x=npy(np.zeros((2**16, 4), np.float32)))
    small = archive(tmp_path / "small.npz", x=npy(np.zeros((2**10, 4), np.float32)))
    with pytest.raises(DataError, match="decompression bomb"):
        open_data(bomb, VECTOR)
    assert len(open_data(small, VECTOR)) == 2**10


def test_arrays_larger_than_the_memory_are_refused(numbers, monkeypatch):
    monkeypatch.setattr(npz, "_installed_memory", lambda: 100)
    with pytest.raises(DataError, match="240 bytes, but this machine has 100"):
        open_data(numbers, VECTOR)


def test_other_members_in_an_archive_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as file:
        file.writestr("../x.pkl", b"data")
    with pytest.raises(DataError, match=r"'\.\./x\.pkl', which is no array"):
        open_data(str(tmp_path / "d.npz"), VECTOR)


# Pictures


def test_pixels_become_numbers_by_mean_std_and_order(tmp_path):
    pixels = noise(2, 8, 8, 3)
    path = save(tmp_path / "d.npz", images=pixels, labels=[1, 2])
    options = ImageOptions(mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0), order="BGR")
    batch = everything(open_data(path, PICTURE, image=options))
    blue = (pixels[..., 2] / 255 - 0.5) / 0.5
    red = (pixels[..., 0] / 255 - 0.0) / 2.0
    assert np.allclose(batch.inputs["x"][:, 0], blue, atol=1e-6)  # float32
    assert np.allclose(batch.inputs["x"][:, 2], red, atol=1e-6)
    assert batch.labels.tolist() == [1, 2]


def test_pixels_are_in_zero_to_one_by_default_and_minus_one_to_one_with_one_half(tmp_path):
    path = save(tmp_path / "d.npz", images=np.stack([np.zeros((8, 8, 3)), np.full((8, 8, 3), 255)]).astype(np.uint8))
    plain = everything(open_data(path, PICTURE)).inputs["x"]
    centred = everything(open_data(path, PICTURE, image=ImageOptions(mean=0.5, std=0.5))).inputs["x"]
    assert [plain[0].unique().tolist(), plain[1].unique().tolist()] == [[0.0], [1.0]]
    assert [centred[0].unique().tolist(), centred[1].unique().tolist()] == [[-1.0], [1.0]]


@pytest.mark.parametrize("name", ["images", "x"])
def test_uint8_arrays_in_any_layout_are_pictures(tmp_path, name):
    pixels = noise(2, 8, 8, 3)
    last = everything(open_data(save(tmp_path / "a.npz", **{name: pixels}), PICTURE))
    first = everything(open_data(save(tmp_path / "b.npz", **{name: pixels.transpose(0, 3, 1, 2)}), PICTURE))
    assert torch.equal(last.inputs["x"], first.inputs["x"])
    grey = everything(open_data(save(tmp_path / "c.npz", **{name: pixels[..., 0]}), GREY))
    assert torch.equal(grey.inputs["x"][:, 0], last.inputs["x"][:, 0])


def test_grey_pictures_fill_three_channels_and_coloured_ones_turn_grey(tmp_path):
    grey = noise(1, 8, 8)
    filled = everything(open_data(save(tmp_path / "a.npz", images=grey), PICTURE)).inputs["x"]
    assert all(np.allclose(filled[0, channel] * 255, grey[0]) for channel in range(3))
    red = np.zeros((1, 8, 8, 3), np.uint8)
    red[..., 0] = 255
    turned = everything(open_data(save(tmp_path / "b.npz", images=red), GREY)).inputs["x"]
    assert turned.unique().item() == pytest.approx(0.299, abs=0.002)  # luma of ITU-R 601, rounded to a level


def test_a_program_may_take_channels_last_or_bytes(tmp_path):
    pixels = noise(2, 8, 8, 3)
    path = save(tmp_path / "d.npz", images=pixels)
    last = everything(open_data(path, takes(("x", ("batch", 8, 8, 3))), image=ImageOptions(mean=(0.1, 0.2, 0.3))))
    assert np.allclose(last.inputs["x"], pixels / 255 - [0.1, 0.2, 0.3], atol=1e-6)
    as_bytes = everything(open_data(path, takes(("x", ("batch", 3, 8, 8), torch.uint8))))
    assert np.array_equal(as_bytes.inputs["x"], pixels.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("size", "target", "resize_size", "scaled"),
    [
        ((8, 8), (8, 8), 16, (8, 8)),  # of the right size already: left alone
        ((30, 20), (10, 10), None, (15, 10)),  # shorter side to the crop
        ((30, 20), (10, 10), 12, (18, 12)),
        ((20, 20), (10, 10), None, (10, 10)),
        ((4, 6), (8, 8), None, (8, 12)),  # enlarged
        ((20, 20), (5, 10), None, (10, 10)),  # an oblong crop is just covered
        ((7, 5), (3, 3), None, (4, 3)),
    ],
)
def test_pictures_are_resized_by_the_shorter_side_then_cropped_in_the_centre(
    tmp_path, size, target, resize_size, scaled
):
    pixels = noise(*size, 3)
    path = save(tmp_path / "d.npz", images=pixels[np.newaxis])
    options = ImageOptions(image_size=target, resize_size=resize_size)
    got = everything(open_data(path, takes(("x", ("batch", 3, *target))), image=options)).inputs["x"][0] * 255

    image = Image.fromarray(pixels)
    if scaled != size:
        image = image.resize((scaled[1], scaled[0]), Image.Resampling.BILINEAR)
    top, left = round((scaled[0] - target[0]) / 2), round((scaled[1] - target[1]) / 2)
    expected = np.asarray(image)[top : top + target[0], left : left + target[1]].transpose(2, 0, 1)
    assert np.allclose(got, expected, atol=1e-3)


def test_enlarging_and_shrinking_keep_a_plain_colour(tmp_path):
    pixels = np.full((1, 37, 53, 3), 77, np.uint8)
    batch = everything(open_data(save(tmp_path / "d.npz", images=pixels), PICTURE))
    assert np.allclose(batch.inputs["x"] * 255, 77)


def test_without_any_size_pictures_stay_as_they_are_and_must_be_alike(tmp_path):
    free = takes(("x", ("batch", 3, "height", "width")))
    for name, size in (("a", 6), ("b", 6), ("c", 7)):
        Image.fromarray(noise(size, 9, 3)).save(tmp_path / f"{name}.png")
    assert everything(open_data(f"{tmp_path}[:2]", free)).inputs["x"].shape == (2, 3, 6, 9)
    with pytest.raises(DataError, match=r"9 × 6 and 9 × 7, which make no batch. Give image_size"):
        open_data(str(tmp_path), free)
    sized = everything(open_data(str(tmp_path), free, image=ImageOptions(image_size=5)))
    assert sized.inputs["x"].shape == (3, 3, 5, 5)


def test_a_large_jpeg_is_decoded_in_part_and_stays_near_the_full_decoding(tmp_path):
    smooth = Image.fromarray(noise(6, 6, 3)).resize((900, 600), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.jpg", quality=95)
    got = everything(open_data(str(tmp_path), takes(("x", ("batch", 3, 60, 60))))).inputs["x"][0] * 255
    full = Image.open(tmp_path / "a.jpg").resize((90, 60), Image.Resampling.BILINEAR).crop((15, 0, 75, 60))
    difference = np.abs(got.numpy() - np.asarray(full).transpose(2, 0, 1))
    assert difference.max() <= 3  # levels of 255; reduced decoding and the filter round at different places


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "size is 0"),
        ({"image_size": (8, -1)}, "size is -1"),
        ({"image_size": 8, "resize_size": 7}, "resize_size is 7, smaller than the crop of 8"),
        ({"std": 0.0}, "std is 0.0"),
        ({"std": (1.0, float("nan"), 1.0)}, "std is"),
        ({"mean": float("inf")}, "mean is inf"),
        ({"order": "GBR"}, "order is 'GBR'"),
    ],
)
def test_image_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ImageOptions(**options)


@pytest.mark.parametrize(
    ("signature", "options", "message"),
    [
        (PICTURE, {"image_size": 9}, r"image_size is 9, but the program takes x: float32\[batch, 3, 8, 8\]"),
        (PICTURE, {"mean": (0.1, 0.2)}, "mean has 2 numbers.*give 1 or 3"),
        (GREY, {"std": (0.1, 0.2, 0.3)}, "std has 3 numbers.*give 1 or 1"),
        (takes(("x", ("batch", 5, 8, 8))), {}, "holds pictures, but the program takes"),
        (takes(("x", ("batch", 3, 8, 8)), ("y", ("batch",))), {}, "one input"),
    ],
)
def test_image_options_that_do_not_fit_the_program_are_refused(tmp_path, signature, options, message):
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=message):
        open_data(str(tmp_path), signature, image=ImageOptions(**options))


# Packed pictures


def packed(path, files, **arrays):
    offsets = np.cumsum([0] + [len(file) for file in files])
    return save(path, jpeg=np.frombuffer(b"".join(files), np.uint8), offsets=offsets, **arrays)


def test_packed_pictures_are_decoded_with_their_labels(tmp_path):
    pixels = noise(5, 8, 8, 3)
    names = np.array(["a", "b", "c", "d", "e"])
    path = packed(tmp_path / "d.npz", [png(one) for one in pixels], labels=np.arange(5), names=names, classes=names)
    batch = everything(open_data(path, PICTURE, batch_size=2))
    assert np.allclose(batch.inputs["x"] * 255, pixels.transpose(0, 3, 1, 2))
    assert batch.labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"jpeg": np.zeros(3, np.int8), "offsets": np.arange(2)}, "'jpeg' is int8.*bytes"),
        ({"jpeg": np.zeros(3, np.uint8), "offsets": np.array([0.0, 3.0])}, "'offsets' is float64"),
        ({"jpeg": np.zeros(3, np.uint8), "offsets": np.array([0, 4])}, "do not rise from 0 to the 3 bytes"),
        ({"jpeg": np.zeros(3, np.uint8), "offsets": np.array([0, 2, 1])}, "do not rise"),
        ({"jpeg": np.zeros(3, np.uint8), "offsets": np.array([-1, 2])}, "do not rise"),
        ({"jpeg": np.zeros(3, np.uint8), "offsets": np.array([], np.int64)}, "do not rise"),
        ({"jpeg": np.zeros(3, np.uint8), "offsets": np.array([0])}, "no sample"),
        ({"jpeg": np.zeros(3, np.uint8), "offsets": np.array([0, 3])}, "sample 0 is not a picture"),
    ],
)
def test_packs_that_are_wrong_are_refused(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        open_data(save(tmp_path / "d.npz", **arrays), PICTURE)


def test_the_shared_pictures_are_the_same_as_by_plain_decoding():
    path = shared_data.shared(shared_data.IMAGENET_SAMPLE)
    options = ImageOptions(mean=shared_data.MOBILENET_MEAN, std=shared_data.MOBILENET_STD)
    signature = takes(("x", ("batch", 3, 224, 224)), classes=1000)
    batch = everything(open_data(f"{path}[990:]", signature, image=options))
    images, labels = shared_data.pictures(shared_data.IMAGENET_SAMPLE, 990)
    assert torch.equal(
        batch.inputs["x"], shared_data.normalized(images, shared_data.MOBILENET_MEAN, shared_data.MOBILENET_STD)
    )
    assert torch.equal(batch.labels, labels)


@pytest.mark.parametrize("options", [{"mean": 0.5}, {"std": 0.5}, {"order": "BGR"}, {"image_size": 8}])
def test_options_for_images_are_refused_where_there_are_none(tmp_path, options):
    image = ImageOptions(**options)
    path = save(tmp_path / "floats.npz", x=np.zeros((2, 3, 8, 8), np.float32))
    with pytest.raises(DataError, match=r"floats\.npz holds numbers, not uint8 pictures.*mean, std"):
        open_data(path, PICTURE, image=image)
    assert len(open_data(path, PICTURE, image=ImageOptions())) == 2
    assert len(open_data(save(tmp_path / "pixels.npz", x=noise(2, 3, 8, 8)), PICTURE, image=image)) == 2


# Folders and lists


@pytest.fixture
def folder(tmp_path):
    """Class folders "a" with three pictures and "b" with one; picture k has the value k everywhere."""
    values = iter(range(10, 50, 10))
    for name, count in (("b", 1), ("a", 3)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(np.full((8, 8, 3), next(values), np.uint8)).save(tmp_path / "set" / name / f"{index}.png")
    return tmp_path / "set"


def values_of(batch):
    return [round(value) for value in (batch.inputs["x"][:, 0, 0, 0] * 255).tolist()]


def test_a_folder_numbers_its_classes_by_name_and_gives_them_in_turn(folder):
    batch = everything(open_data(str(folder), TWO_CLASSES))
    assert batch.labels.tolist() == [0, 1, 0, 0]
    assert values_of(batch) == [20, 10, 30, 40]


def test_hidden_files_and_other_files_in_a_folder_are_no_pictures(folder):
    (folder / ".cache").mkdir()
    (folder / "a" / "._0.png").write_bytes(b"not a picture")
    (folder / "a" / "notes.txt").write_text("notes")
    assert len(open_data(str(folder), TWO_CLASSES)) == 4


def test_a_folder_of_pictures_has_no_labels(folder):
    source = open_data(str(folder / "a"), PICTURE)
    assert not source.has_labels
    assert values_of(everything(source)) == [20, 30, 40]


def test_folders_that_are_wrong_are_refused(folder, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="neither class folders nor pictures"):
        open_data(str(tmp_path / "nothing"), PICTURE)
    Image.fromarray(noise(8, 8, 3)).save(folder / "stray.png")
    with pytest.raises(DataError, match=r"stray\.png first, beside class folders, a first"):
        open_data(str(folder), TWO_CLASSES)
    (folder / "stray.png").unlink()
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=r"class folder .*empty has no pictures"):
        open_data(str(folder), TWO_CLASSES)


@pytest.mark.parametrize("classes", [2, 5])
def test_class_folders_that_are_not_all_classes_are_refused_with_what_to_do(folder, classes):
    # Labels of "c" and "d", classes 2 and 3 of five, would silently be 0 and 1.
    (folder / "c").mkdir()
    Image.fromarray(noise(8, 8, 3)).save(folder / "c" / "0.png")
    with pytest.raises(
        DataError, match=rf"3 class folders \(a, b, c\), but .* {classes} classes.*sorted.*`path label`"
    ):
        open_data(str(folder), takes(("x", ("batch", 3, 8, 8)), classes=classes))


def test_class_folders_are_not_counted_where_the_outputs_are_no_classes(folder):
    assert len(open_data(str(folder), takes(("x", ("batch", 3, 8, 8)), classes="free"))) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0.png is not a picture of a known format"),
        (b"GIF89a", "0.png"),
        (png(noise(8, 8, 3))[:60], "0.png cannot be decoded"),
        (png(noise(8, 8).astype(np.uint16) * 256), "more than 8 bits a pixel"),
    ],
)
def test_unreadable_pictures_are_refused_by_path(folder, content, message):
    (folder / "a" / "0.png").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_data(str(folder), TWO_CLASSES)


def test_a_picture_of_absurd_size_is_refused_before_it_is_decoded(folder, monkeypatch):
    Image.fromarray(np.zeros((100, 100), np.uint8)).save(folder / "a" / "0.png")
    monkeypatch.setattr("slimgraph.training.images._MOST_PIXELS", 9_999)
    with pytest.raises(DataError, match=r"0\.png is refused: 100 × 100 is more than 9999 pixels"):
        open_data(str(folder), TWO_CLASSES)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_000)  # beyond twice this Pillow refuses by itself
    with pytest.raises(DataError, match=r"0\.png is refused"):
        open_data(str(folder), TWO_CLASSES)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_000)  # between once and twice it only warns
    with pytest.raises(DataError, match=r"0\.png is refused"):
        open_data(str(folder), TWO_CLASSES)


def test_a_list_names_pictures_relative_to_itself(folder):
    (folder / "a" / "with space.png").write_bytes((folder / "a" / "0.png").read_bytes())
    (folder / "list.txt").write_text("a/1.png 3\n\n  a/with space.png\t7  \n")
    batch = everything(open_data(str(folder / "list.txt"), PICTURE))
    assert batch.labels.tolist() == [3, 7]
    assert values_of(batch) == [30, 20]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a/1.png", "line 2: 'a/1.png' is not `path label`"),
        ("a/1.png cat", "line 2"),
        ("a/1.png -1", "line 2"),
        ("a/1.png 1.5", "line 2"),
        ("7", "line 2"),
        ("a/9.png 1", "line 2: there is no file .*9.png"),
    ],
)
def test_bad_lines_of_a_list_are_refused_by_number(folder, line, message):
    (folder / "list.txt").write_text(f"a/1.png 0\n{line}\n")
    with pytest.raises(DataError, match=message):
        open_data(str(folder / "list.txt"), PICTURE)


def test_a_list_that_is_empty_or_no_text_is_refused(folder):
    (folder / "list.txt").write_text("\n")
    with pytest.raises(DataError, match="no sample"):
        open_data(str(folder / "list.txt"), PICTURE)
    with pytest.raises(DataError, match=r"neither an \.npz file nor a text file"):
        open_data(str(folder / "a" / "0.png"), PICTURE)


# Digits


def test_digits_are_scaled_pictures_with_labels():
    batch = everything(open_data("digits", GREY))
    assert batch.inputs["x"].shape == (1797, 1, 8, 8)
    assert (batch.inputs["x"].min(), batch.inputs["x"].max()) == (0.0, 1.0)
    assert batch.labels[:10].tolist() == list(range(10))


def test_digits_are_parted_into_train_and_test_by_class():
    train, test = (everything(open_data(f"digits:{part}", GREY)) for part in ("train", "test"))
    assert len(train) + len(test) == 1797
    shares = test.labels.bincount() / (train.labels.bincount() + test.labels.bincount())
    assert ((shares - 0.2).abs() < 0.01).all()
    seen = {row.numpy().tobytes() for row in train.inputs["x"]}
    assert not any(row.numpy().tobytes() in seen for row in test.inputs["x"])


def test_digits_fit_a_program_that_takes_64_numbers():
    source = open_data("digits:test[:7]", takes(("pixels", ("batch", 64))))
    assert everything(source).inputs["pixels"].shape == (7, 64)


def test_digits_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match=r"digits.*float32\[32, 1, 8, 8\], but the program takes"):
        open_data("digits", PICTURE)
    with pytest.raises(DataError, match="one picture each"):
        open_data("digits", takes(("x", ("batch", 64)), ("y", ("batch", 64))))
    with pytest.raises(DataError, match="no file or folder digits:validation"):
        open_data("digits:validation", GREY)


# Callables


@pytest.mark.parametrize(
    "item",
    [
        "torch.full((2, 4), float(i)), torch.tensor([i, i])",
        "[torch.full((2, 4), float(i)), [i, i]]",
        "{'x': np.full((2, 4), float(i)), 'label': np.array([i, i])}",
        "((np.full((2, 4), float(i)),), [i, i])",
        "({'x': torch.full((2, 4), float(i))}, [i, i])",
    ],
)
@pytest.mark.parametrize("form", ["return [({}) for i in range(3)]", "for i in range(3): yield ({})"])
def test_a_callable_gives_batches_in_any_usual_form(module, item, form):
    source = open_data(module(f"def make():\n    {form.format(item)}"), VECTOR)
    assert [batch.labels.tolist() for batch in source] == [[0, 0], [1, 1], [2, 2]]
    assert [batch.inputs["x"][0, 0].item() for batch in source] == [0, 1, 2]  # the second time, from the beginning
    assert source.has_labels
    assert source.samples is None
    assert source
    with pytest.raises(TypeError, match="unknown length"):
        len(source)


@pytest.mark.parametrize("item", ["torch.ones(2, 4)", "np.ones((2, 4), np.float32)", "[torch.ones(2, 4)]"])
def test_a_callable_may_give_no_labels(module, item):
    source = open_data(module(f"def make():\n    return [{item}]"), VECTOR)
    assert not source.has_labels
    assert everything(source).inputs["x"].shape == (2, 4)


@pytest.mark.parametrize(
    ("item", "labels"),
    [
        ("(torch.ones(1, 4), torch.ones(1, 2))", None),
        ("(torch.ones(1, 4), torch.ones(1, 2), [3])", [3]),
        ("((torch.ones(1, 4), torch.ones(1, 2)), [3])", [3]),
        ("({'a': torch.ones(1, 4), 'b': torch.ones(1, 2)}, [3])", [3]),
        ("{'a': torch.ones(1, 4), 'b': torch.ones(1, 2), 'labels': [3]}", [3]),
    ],
)
def test_a_pair_for_two_inputs_is_no_input_and_label(module, item, labels):
    signature = takes(("a", ("batch", 4)), ("b", ("batch", 2)))
    batch = everything(open_data(module(f"def make():\n    return [{item}]"), signature))
    assert batch.inputs["b"].shape == (1, 2)
    assert (batch.labels.tolist() if labels else batch.labels) == labels


def test_slices_and_limits_of_a_callable_cut_its_batches(module):
    make = module("def make():\n    for i in range(0, 9, 3): yield torch.arange(i, i + 3.0)[:, None].expand(3, 4)")

    def chosen(spec, **options):
        return [batch.inputs["x"][:, 0].int().tolist() for batch in open_data(spec, VECTOR, **options)]

    assert chosen(f"{make}[1:7]") == [[1, 2], [3, 4, 5], [6]]
    assert chosen(f"{make}[4:]") == [[4, 5], [6, 7, 8]]
    assert chosen(f"{make}[4:]", limit=3) == [[4, 5], [6]]
    assert chosen(make, limit=3) == [[0, 1, 2]]
    with pytest.raises(DataError, match="counts from the end"):
        open_data(f"{make}[-3:]", VECTOR)
    with pytest.raises(DataError, match="no sample"):
        open_data(f"{make}[9:]", VECTOR)


def test_a_stream_is_read_no_further_than_asked(module):
    make = module("def make():\n    yield torch.ones(2, 4)\n    raise RuntimeError('read too far')")
    assert len(everything(open_data(f"{make}[:2]", VECTOR))) == 2


def test_a_loader_is_made_once_and_a_generator_for_each_reading(module):
    make = module(
        "calls = []\n\ndef make():\n    calls.append(1)\n    return [torch.ones(2, 4)]\n\n"
        "def generate():\n    calls.append(1)\n    yield torch.ones(2, 4)"
    )
    for reference, calls in ((make, 1), ("my_batches:generate", 3)):
        source = open_data(reference, VECTOR)
        assert len(list(source)) == len(list(source)) == 1
        assert len(sys.modules["my_batches"].calls) == calls
        sys.modules["my_batches"].calls.clear()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def make():\n    return []", "my_batches:make has no sample"),
        ("def make():\n    return 3", "returned an object of type int; it must return an iterable"),
        ("def make():\n    return [torch.ones(0, 4)]", "batch 0 has no sample"),
        ("def make():\n    return ['text']", "batch 0"),
        ("def make():\n    return [torch.ones(2, 5)]", r"batch 0: input 'x' is float32\[2, 5\]"),
        ("def make():\n    return [{'y': torch.ones(2, 4)}]", "batch 0 has an input 'y'.*Existing: x"),
        ("def make():\n    return [(torch.ones(2, 4), [0])]", r"batch 0: 2 samples, but labels of shape \[1\]"),
        ("def make():\n    return [(torch.ones(2, 4), [0, 12])]", "batch 0: sample 1 has label 12"),
        ("def make():\n    return [torch.ones(2, 4).log() * float('nan')]", "batch 0: 'x' of sample 0 is NaN"),
        ("make = 3", "of type int, which cannot be called"),
        ("def mak():\n    pass", "has no 'make'. Closest: mak"),
    ],
)
def test_callables_that_do_not_fit_are_refused(module, source, message):
    with pytest.raises(DataError, match=message):
        open_data(module(source), VECTOR)


def test_later_batches_of_a_callable_are_checked_too(module):
    source = open_data(module("def make():\n    return [(torch.ones(2, 4), [0, 1]), torch.ones(2, 4)]"), VECTOR)
    with pytest.raises(DataError, match="batch 1 has no labels, unlike the batches before it"):
        list(source)


def test_a_used_up_iterator_is_refused(module):
    source = open_data(module("one = iter([torch.ones(2, 4)])\n\ndef make():\n    return one"), VECTOR)
    with pytest.raises(DataError, match="used up already"):
        list(source)


def test_errors_of_the_users_own_code_come_through(module):
    with pytest.raises(ZeroDivisionError):
        open_data(module("def make():\n    return 1 / 0"), VECTOR)
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        open_data(module("import no_such_library\n\ndef make():\n    pass"), VECTOR)


def test_a_cut_batch_of_a_program_with_a_fixed_batch_is_refused(module):
    make = module("def make():\n    return [torch.ones(2, 4)] * 2")
    with pytest.raises(DataError, match="batch 0 would be cut"):
        open_data(f"{make}[1:]", takes(("x", (2, 4))))


# Specs


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing.npz", r"no file or folder missing\.npz"),
        ("missing/folder", "no file or folder missing/folder"),
        ("digits[5]", r"\[start:stop\], as in digits\[:256\]"),
        ("digits[::2]", r"\[start:stop\]"),
        ("digits[a:b]", r"\[start:stop\]"),
        ("digits[5:5]", r"digits\[5:5\] has no sample; there are 1797 in all"),
        ("digits[2000:]", "no sample"),
        ("no_such_module:make", "no module 'no_such_module'"),
        ("json.no_such_part:make", "no module 'json.no_such_part'"),
        ("json:lads", "'json' has no 'lads'. Closest: load"),
        ("", "names no data"),
        ("[:5]", "names no data"),
    ],
)
def test_specs_that_name_nothing_are_refused(spec, message):
    with pytest.raises(DataError, match=message):
        open_data(spec, GREY)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"limit": 0}])
def test_sizes_below_one_are_refused(options):
    with pytest.raises(ConfigError, match="at least 1"):
        open_data("digits", GREY, **options)


def test_a_program_without_inputs_is_refused():
    with pytest.raises(DataError, match="takes no input"):
        open_data("digits", Signature(inputs=(), outputs=()))
