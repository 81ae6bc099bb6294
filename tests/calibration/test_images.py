"""Pictures: geometry and numbers against direct computations, odd files, defaults from the model's input."""

import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from qcompiler.calibration.image_options import ImageOptions, is_image_input, parse_image_options, plan_images
from qcompiler.calibration.images import find_images, fit, image_array, normalize
from qcompiler.calibration.readers import SourceOptions, read_source
from qcompiler.engine import TensorInfo
from qcompiler.errors import CalibrationError

Image = pytest.importorskip("PIL.Image")

FLOAT = np.dtype(np.float32)
NCHW = TensorInfo("image", FLOAT, ("batch", 3, 8, 8))
ROUNDING = 4 * 2.0**-24
"""Four float32 roundings, relative: scale, mean, std and the constants themselves."""


def pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def save(path: Path, array: np.ndarray) -> Path:
    Image.fromarray(array[:, :, 0] if array.shape[2:] == (1,) else array).save(path)
    return path


def fitted(array: np.ndarray, info: TensorInfo = NCHW, **options: object) -> np.ndarray:
    return fit(array, plan_images(info, ImageOptions(**options)))  # type: ignore[arg-type]


class TestPlan:
    @pytest.mark.parametrize(
        ("shape", "layout"),
        [
            ((1, 3, 224, 224), "NCHW"),
            (("n", 1, 28, 28), "NCHW"),
            ((None, 96, 96, 3), "NHWC"),
            ((1, 28, 28, 1), "NHWC"),
            ((1, 3, 224, 3), "NCHW"),
            (("batch", "num_channels", "height", "width"), "NCHW"),
            (("batch", "height", "width", "channels"), "NHWC"),
            ((None, None, None, None), "NCHW"),
            ((1, 64, 32, 32), None),
            ((1, 8, 64, 16), None),
            ((1, 3, 224), None),
            (None, None),
        ],
    )
    def test_the_layout_is_read_off_the_shape(self, shape: object, layout: str | None) -> None:
        info = TensorInfo("x", FLOAT, shape)  # type: ignore[arg-type]
        assert is_image_input(info) is (layout is not None)
        if layout is not None:
            assert plan_images(info, ImageOptions(size=None, resize="none")).layout == layout

    @pytest.mark.parametrize(
        ("dtype", "scale", "mean"),
        [(np.float32, 1 / 255, 0), (np.float16, 1 / 255, 0), (np.uint8, 1, 0), (np.int8, 1, 128)],
    )
    def test_the_numbers_follow_the_type(self, dtype: type, scale: float, mean: float) -> None:
        plan = plan_images(TensorInfo("x", np.dtype(dtype), (1, 3, 8, 8)), ImageOptions())
        assert (plan.scale, plan.mean, plan.std, plan.order) == (scale, (mean,), (1.0,), "rgb")

    def test_what_was_assumed_is_said(self) -> None:
        text = "8x8 (auto), rgb, NCHW, scale 1/255, mean 0, std 1; assumed: order rgb, scale 1/255 without mean and std"
        assert str(plan_images(NCHW, ImageOptions())) == text
        given = ImageOptions(order="bgr", scale=1.0, mean=(1.0, 2.0, 3.0))
        assert str(plan_images(NCHW, given)) == "8x8 (auto), bgr, NCHW, scale 1, mean 1 2 3, std 1"

    @pytest.mark.parametrize(
        ("shape", "options", "text"),
        [
            ((1, 4, 8, 8), {"layout": "NCHW"}, "input 'x' has 4 channels; pictures have 1 or 3"),
            ((1, 3, 8, 8), {"order": "gray"}, "input 'x' has 3 channels; the image option order gray does not fit"),
            ((1, 3, 8, 8), {"size": (8, 9)}, "input 'x' has W = 8; the image option size says 9"),
            ((1, 3, 8, 8), {"mean": (1.0, 2.0)}, "the image option mean has 2 numbers; input 'x' has 3 channels"),
            (
                (1, 3, None, 8),
                {},
                "input 'x' leaves height or width open; give the image option size (--image size=224)",
            ),
            ((1, 7), {}, "input 'x' of float32[1, 7] takes no pictures of layout NCHW or NHWC"),
            ((1, 7), {"layout": "HWC"}, "input 'x' of float32[1, 7] takes no pictures of layout HWC"),
        ],
    )
    def test_what_does_not_fit_the_model_is_an_error(self, shape: object, options: object, text: str) -> None:
        with pytest.raises(CalibrationError, match=f"^{re.escape(text)}$"):
            plan_images(TensorInfo("x", FLOAT, shape), ImageOptions(**options))  # type: ignore[arg-type]


class TestToml:
    def test_all_keys(self) -> None:
        text = """
            size = 224
            resize = "letterbox"
            crop = 1
            interpolation = "bicubic"
            place = "corner"
            pad = 0
            layout = "NHWC"
            order = "bgr"
            scale = 1
            mean = [123.675, 116.28, 103]
            std = 58
        """
        assert parse_image_options(text) == ImageOptions(
            (224, 224), "letterbox", 1, "bicubic", "corner", 0, "NHWC", "bgr", 1, (123.675, 116.28, 103), (58,)
        )
        assert parse_image_options("size = [10, 20]").size == (10, 20)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("size = ", "cannot read my.toml: Invalid value (at end of document)"),
            ("widht = 3", "my.toml: unknown key 'widht'; expected size, resize, crop, "),
            ('size = "8"', "my.toml: size is '8'; expected numbers"),
            ("size = [8.5, 8]", "my.toml: size is [8.5, 8]; expected numbers"),
            ("pad = true", "my.toml: pad is True; expected a whole number"),
            ("scale = [1]", "my.toml: scale is [1]; expected a number"),
            ("order = 3", "my.toml: order is 3; expected text"),
            ("size = [1, 2, 3]", "the image option size is [1, 2, 3]; expected height and width in pixels"),
            ('resize = "crop"', "the image option resize is 'crop'; expected auto, shorter, exact, letterbox, none"),
            ('layout = "NCC"', "the image option layout is 'NCC'; expected letters of NCHW, like NHWC"),
            ("std = [1, 0, 1]", "the image option std holds 0; expected numbers to divide by"),
            ("crop = 1.5", "the image option crop is 1.5; expected a share above 0, up to 1"),
            ("pad = 256", "the image option pad is 256; expected 0 to 255"),
        ],
    )
    def test_mistakes_are_named(self, text: str, message: str) -> None:
        with pytest.raises(CalibrationError, match=f"^{re.escape(message)}"):
            parse_image_options(text, "my.toml")


class TestGeometry:
    def test_a_picture_of_the_right_size_stays_unless_a_way_is_asked_for(self) -> None:
        given = pixels(8, 8)
        np.testing.assert_array_equal(fitted(given), given)
        assert not np.array_equal(fitted(given, resize="shorter"), given)  # enlarged to 9x9, cropped

    @pytest.mark.parametrize(
        ("height", "width", "box", "top", "left"),
        [(16, 32, (16, 32), 0, 8), (33, 16, (33, 16), 8, 0), (16, 21, (16, 21), 0, 2), (16, 16, (16, 16), 0, 0)],
    )
    def test_the_centre_is_cropped(self, height: int, width: int, box: tuple[int, int], top: int, left: int) -> None:
        info = TensorInfo("x", FLOAT, (1, 3, 16, 16))
        given = pixels(height, width)
        made = fitted(given, info, crop=1.0, resize="shorter")
        # Python rounds halves to even, as torchvision does: 2.5 is 2, 8.5 is 8.
        np.testing.assert_array_equal(made, given[top : top + 16, left : left + 16])
        assert box == given.shape[:2]

    def test_the_shorter_side_is_resized_to_the_size_by_the_crop(self) -> None:
        info = TensorInfo("x", FLOAT, (1, 3, 14, 14))
        given = pixels(40, 30)
        whole = np.asarray(
            Image.fromarray(given).resize((16, 21), Image.Resampling.BILINEAR)
        )  # 14 / 0.875, 16 * 40 / 30
        np.testing.assert_array_equal(fitted(given, info), whole[4:18, 1:15])  # 3.5 rounds to even

    def test_a_wide_input_crops_height(self) -> None:
        info = TensorInfo("x", FLOAT, (1, 3, 4, 16))
        given = pixels(16, 16)
        np.testing.assert_array_equal(fitted(given, info, crop=1.0), given[6:10])

    def test_exact_stretches(self) -> None:
        given = pixels(5, 9)
        made = np.asarray(Image.fromarray(given).resize((8, 8), Image.Resampling.NEAREST))
        np.testing.assert_array_equal(fitted(given, resize="exact", interpolation="nearest"), made)

    @pytest.mark.parametrize(("place", "top"), [("corner", 0), ("centre", 2)])
    def test_letterbox_pads(self, place: str, top: int) -> None:
        given = pixels(8, 16)
        made = fitted(given, resize="letterbox", place=place, pad=9)
        inner = np.asarray(Image.fromarray(given).resize((8, 4), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(made[top : top + 4], inner)
        outside = np.delete(made, range(top, top + 4), axis=0)
        assert outside.shape == (4, 8, 3)
        assert (outside == 9).all()

    def test_letterbox_enlarges_too(self) -> None:
        assert fitted(pixels(2, 4, 1), TensorInfo("x", FLOAT, (1, 1, 8, 8)), resize="letterbox").shape == (8, 8, 1)


class TestNumbers:
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    @pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
    @pytest.mark.parametrize("order", ["rgb", "bgr"])
    def test_layout_order_and_normalization(self, layout: str, order: str) -> None:
        shape = (1, 3, 8, 8) if layout == "NCHW" else (1, 8, 8, 3)
        plan = plan_images(TensorInfo("x", FLOAT, shape), ImageOptions(order=order, mean=self.MEAN, std=self.STD))
        given = pixels(8, 8)
        made = normalize(given, plan)
        for channel in range(3):
            source = channel if order == "rgb" else 2 - channel
            want = (given[:, :, source] / 255 - self.MEAN[channel]) / self.STD[channel]
            have = made[channel] if layout == "NCHW" else made[:, :, channel]
            np.testing.assert_allclose(have, want, rtol=0, atol=ROUNDING * (1 + max(self.MEAN)) / min(self.STD))
        assert made.dtype == np.float32

    def test_integer_inputs_round_and_clip(self) -> None:
        given = np.array([[[0, 127, 255]]], np.uint8)
        signed = plan_images(TensorInfo("x", np.dtype(np.int8), (1, 1, 1, 3)), ImageOptions(layout="NHWC"))
        assert normalize(given, signed).ravel().tolist() == [-128, -1, 127]
        doubled = plan_images(TensorInfo("x", np.dtype(np.uint8), (1, 1, 1, 3)), ImageOptions(scale=1.5, layout="NHWC"))
        assert normalize(given, doubled).ravel().tolist() == [0, 190, 255]  # 190.5 rounds to even

    def test_a_layout_without_channels_or_batch(self) -> None:
        plan = plan_images(TensorInfo("x", FLOAT, (4, 6)), ImageOptions(layout="WH", scale=1.0))
        given = pixels(6, 4, 1)
        np.testing.assert_array_equal(image_array(given, plan), given[:, :, 0].T)


class TestFiles:
    def test_a_folder_is_read_in_batches_in_natural_order(self, tmp_path: Path) -> None:
        arrays = [pixels(8, 8, seed=i) for i in range(5)]
        for name, array in zip(("a/1", "a/2", "a/10", "b/x", "c/d/e"), arrays, strict=True):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            save(tmp_path / f"{name}.png", array)
        (tmp_path / ".hidden.png").write_bytes(b"")
        (tmp_path / "a" / "labels.txt").write_text("0")
        source = read_source(tmp_path, [NCHW], SourceOptions(ImageOptions(scale=1.0), batch=2))
        feeds = [f["image"] for f in source]
        assert [len(f) for f in feeds] == [2, 2, 1]
        np.testing.assert_array_equal(np.concatenate(feeds), np.stack(arrays).transpose(0, 3, 1, 2))
        assert len(source) == 3
        assert source.about == ("5 of 5 pictures: 8x8 (auto), rgb, NCHW, scale 1, mean 0, std 1; assumed: order rgb")

    def test_a_fixed_batch_repeats_pictures_of_the_one_before(self, tmp_path: Path) -> None:
        for index in range(5):
            save(tmp_path / f"{index}.png", np.full((8, 8, 3), index, np.uint8))
        info = TensorInfo("image", np.dtype(np.uint8), (2, 3, 8, 8))
        assert [f["image"][:, 0, 0, 0].tolist() for f in read_source(tmp_path, [info])] == [[0, 1], [2, 3], [3, 4]]
        few = TensorInfo("image", np.dtype(np.uint8), (7, 3, 8, 8))
        assert [f["image"][:, 0, 0, 0].tolist() for f in read_source(tmp_path, [few])] == [[0, 1, 2, 3, 4, 0, 1]]

    def test_the_limit_is_spread_over_the_folder(self, tmp_path: Path) -> None:
        for index in range(12):
            save(tmp_path / f"{index}.png", np.full((8, 8, 3), index, np.uint8))
        info = TensorInfo("image", np.dtype(np.uint8), (None, 3, 8, 8))
        source = read_source(tmp_path, [info], SourceOptions(batch=2, limit=2))
        assert [f["image"][:, 0, 0, 0].tolist() for f in source] == [[1, 4], [7, 10]]
        assert len(source) == 2

    def test_other_inputs_are_filled_with_numbers(self, tmp_path: Path) -> None:
        save(tmp_path / "a.png", pixels(8, 8))
        infos = [NCHW, TensorInfo("scale", FLOAT, (None, 2)), TensorInfo("mode", np.dtype(np.int64), ())]
        (feed,) = read_source(tmp_path, infos, SourceOptions(values={"scale": 0.5, "mode": 3}))
        assert feed["scale"].tolist() == [[0.5, 0.5]]
        assert feed["mode"].tolist() == 3
        with pytest.raises(CalibrationError, match="the model's input 'scale' takes none of them"):
            read_source(tmp_path, infos, SourceOptions(values={"mode": 3}))
        with pytest.raises(CalibrationError, match=r"input 'mode' of int64 cannot hold 0\.5$"):
            list(read_source(tmp_path, infos, SourceOptions(values={"mode": 0.5, "scale": 1})))

    def test_pictures_of_their_own_size(self, tmp_path: Path) -> None:
        save(tmp_path / "a.png", pixels(8, 9))
        save(tmp_path / "b.png", pixels(7, 5))
        info = TensorInfo("image", FLOAT, (None, 3, None, None))
        own = ImageOptions(resize="none")
        shapes = [f["image"].shape for f in read_source(tmp_path, [info], SourceOptions(own, batch=1))]
        assert shapes == [(1, 3, 8, 9), (1, 3, 7, 5)]
        with pytest.raises(
            CalibrationError, match=r"differ in size \(image\); give --data batch=1 or --image size=224$"
        ):
            list(read_source(tmp_path, [info], SourceOptions(own)))

    def test_a_fixed_batch_cannot_be_changed(self, tmp_path: Path) -> None:
        save(tmp_path / "a.png", pixels(8, 8))
        info = TensorInfo("image", FLOAT, (1, 3, 8, 8))
        with pytest.raises(CalibrationError, match=r"^the option batch is 4; the model's batch is fixed at 1$"):
            read_source(tmp_path, [info], SourceOptions(batch=4))

    def test_links_in_circles_end(self, tmp_path: Path) -> None:
        (tmp_path / "inner").mkdir()
        save(tmp_path / "inner" / "a.png", pixels(8, 8))
        (tmp_path / "inner" / "back").symlink_to(tmp_path, target_is_directory=True)
        assert find_images(tmp_path) == [tmp_path / "inner" / "a.png"]

    def test_the_identity_follows_options(self, tmp_path: Path) -> None:
        save(tmp_path / "a.png", pixels(8, 8))
        marks = {
            read_source(tmp_path, [NCHW], SourceOptions(ImageOptions(mean=mean))).identity for mean in (None, (0.5,))
        }
        assert len(marks) == 2


class TestOddFiles:
    PLAN = plan_images(NCHW, ImageOptions(resize="none", scale=1.0))
    GRAY = plan_images(TensorInfo("x", FLOAT, (1, 1, 8, 8)), ImageOptions(resize="none", scale=1.0))

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_pictures_are_turned_upright(self, tmp_path: Path, orientation: int) -> None:
        given = pixels(4, 6)
        image = Image.fromarray(given)
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(tmp_path / "a.png", exif=exif)
        turns = [
            given, given[:, ::-1], given[::-1, ::-1], given[::-1], given.transpose(1, 0, 2), np.rot90(given, -1),
            given[::-1, ::-1].transpose(1, 0, 2), np.rot90(given),
        ]  # fmt: skip
        made = image_array(tmp_path / "a.png", self.PLAN)
        np.testing.assert_array_equal(made.transpose(1, 2, 0), turns[orientation - 1])

    def test_palettes_with_transparency(self, tmp_path: Path) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.putpixel((1, 0), 1)
        image.save(tmp_path / "a.png", transparency=b"\x00\x80")
        made = image_array(tmp_path / "a.png", self.PLAN)
        assert made.transpose(1, 2, 0).tolist() == [[[10, 20, 30], [40, 50, 60]]]

    def test_alpha_is_dropped(self, tmp_path: Path) -> None:
        given = pixels(3, 3, 4)
        save(tmp_path / "a.png", given)
        np.testing.assert_array_equal(image_array(tmp_path / "a.png", self.PLAN).transpose(1, 2, 0), given[:, :, :3])

    @pytest.mark.parametrize("suffix", ["png", "tif"])
    def test_sixteen_bits_give_their_high_byte(self, tmp_path: Path, suffix: str) -> None:
        given = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
        Image.fromarray(given).save(tmp_path / f"a.{suffix}")
        assert image_array(tmp_path / f"a.{suffix}", self.GRAY).ravel().tolist() == [0, 0, 1, 128, 255]
        assert image_array(tmp_path / f"a.{suffix}", self.PLAN)[2].ravel().tolist() == [0, 0, 1, 128, 255]

    @pytest.mark.parametrize(("mode", "value", "want"), [("1", 1, 255), ("L", 7, 7), ("LA", (7, 9), 7)])
    def test_gray_serves_colour_and_back(self, tmp_path: Path, mode: str, value: object, want: int) -> None:
        Image.new(mode, (2, 2), value).save(tmp_path / "a.png")
        assert np.unique(image_array(tmp_path / "a.png", self.PLAN)).tolist() == [want]
        assert np.unique(image_array(tmp_path / "a.png", self.GRAY)).tolist() == [want]

    def test_cmyk_becomes_rgb(self, tmp_path: Path) -> None:
        Image.new("CMYK", (2, 2), (0, 255, 0, 0)).save(tmp_path / "a.tif")
        assert image_array(tmp_path / "a.tif", self.PLAN)[:, 0, 0].tolist() == [255, 0, 255]

    def test_float_pixels_are_refused(self, tmp_path: Path) -> None:
        Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "a.tif")
        with pytest.raises(CalibrationError, match=r"a\.tif holds float pixels of no known range"):
            image_array(tmp_path / "a.tif", self.PLAN)

    @pytest.mark.parametrize("damage", ["empty", "text", "cut", "bytes"])
    def test_a_broken_file_is_named(self, tmp_path: Path, damage: str) -> None:
        path = save(tmp_path / "a.png", pixels(32, 32))
        data = path.read_bytes()
        idat = data.index(b"IDAT")
        broken = data[: idat + 4] + struct.pack(">I", 0xDEADBEEF) + data[idat + 8 :]
        path.write_bytes({"empty": b"", "text": b"no picture", "cut": data[: len(data) // 2], "bytes": broken}[damage])
        with pytest.raises(CalibrationError, match=f"^cannot read the picture {re.escape(str(path))}: "):
            list(read_source(tmp_path, [NCHW]))


def test_without_pillow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.png", pixels(8, 8))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(CalibrationError, match=r'^reading pictures needs Pillow: pip install "qcompiler\[vision\]"$'):
        read_source(tmp_path, [NCHW])
