"""Truth is float64 arithmetic on the arrays that were saved, not this package's own."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inspector.comparison import DeviceError, Skipped
from inspector.devices import DeviceWatch, Dump, fitted, load_dump, match_names, real_values
from inspector.errors import FeedError
from inspector.qparams import QParams
from tests.samples import floats, npz_folder

SAMPLES = ("00.npz", "01.npz", "02.npz")


def tensors(at: int) -> dict[str, np.ndarray[Any, Any]]:
    return {"/conv/out": floats((1, 4, 3, 2), at), "logits": floats((1, 5), 10 + at)}


def equal(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[k].dtype == wanted[k].dtype and np.array_equal(found[k], wanted[k]) for k in wanted
    )


# ---------------------------------------------------------------------------------- finding files


def test_one_npz_per_sample_is_read_by_the_samples_name(tmp_path: Path) -> None:
    # Saved in another order than the feeds', and not for all of them.
    np.savez(tmp_path / "02.npz", **tensors(2))
    np.savez(tmp_path / "00.npz", **tensors(0))
    dump = load_dump(tmp_path, SAMPLES)
    assert dump.names == ("/conv/out", "logits")
    assert dump.samples == (True, False, True)
    assert equal(dump.tensors(0), tensors(0))
    assert dump.tensors(1) == {}
    assert equal(dump.tensors(2), tensors(2))
    assert equal(dump.tensors(2, ["logits", "other"]), {"logits": tensors(2)["logits"]})
    assert dump.notes == (f"{tmp_path.name} holds nothing for 1 sample: 01.npz",)


def test_images_names_without_suffix_are_samples_names_too(tmp_path: Path) -> None:
    np.savez(tmp_path / "Dog_2.npz", y=np.float32([2]))
    np.savez(tmp_path / "cat-1.npz", y=np.float32([1]))
    dump = load_dump(tmp_path, ("cat 1.jpg", "dog-2.png"))
    assert [float(dump.tensors(i)["y"][0]) for i in (0, 1)] == [1, 2]
    assert dump.notes == ()


def test_names_in_another_script_are_told_apart(tmp_path: Path) -> None:
    np.savez(tmp_path / "犬1.npz", y=np.float32([2]))
    dump = load_dump(tmp_path, ("猫1.png", "犬1.png"))
    assert dump.samples == (False, True)


def test_files_of_other_names_are_taken_in_natural_order_which_is_said(tmp_path: Path) -> None:
    for at in (10, 2, 1):
        np.savez(tmp_path / f"run{at}.npz", y=np.float32([at]))
    dump = load_dump(tmp_path, ("a.png", "b.png"))
    assert [float(dump.tensors(i)["y"][0]) for i in (0, 1)] == [1, 2]
    taken, rest = dump.notes
    assert "run1.npz, run2.npz, run10.npz are taken in feed order" in taken
    assert rest.endswith("holds 3 of 2 samples: the rest of it is not used")


def test_files_that_belong_to_no_sample_beside_some_that_do_are_left_out(tmp_path: Path) -> None:
    for name in ("00", "07"):
        np.savez(tmp_path / f"{name}.npz", y=np.float32([1]))
    (tmp_path / "log.txt").write_text("done")
    dump = load_dump(tmp_path, SAMPLES[:1])
    assert dump.samples == (True,)
    assert any("07.npz belong to no sample" in note for note in dump.notes)
    assert any("log.txt is not part of the dump" in note for note in dump.notes)


@pytest.mark.parametrize("order", ["C", "F"])
def test_one_npz_with_a_leading_sample_axis_gives_each_sample_its_row(
    order: Any, tmp_path: Path
) -> None:
    stacked = {k: np.stack([tensors(i)[k] for i in range(3)]) for k in tensors(0)}
    path = tmp_path / "npu.npz"
    np.savez_compressed(path, **{k: np.asarray(v, order=order) for k, v in stacked.items()})
    for where in (path, tmp_path):
        dump = load_dump(where, SAMPLES)
        assert dump.samples == (True, True, True)
        assert all(equal(dump.tensors(i), tensors(i)) for i in range(3))
        assert dump.notes == ("npu.npz: the leading axis is taken as 3 samples, in feed order",)


def test_fewer_rows_than_samples_leave_the_last_samples_without(tmp_path: Path) -> None:
    np.savez(tmp_path / "npu.npz", y=floats((2, 5)))
    dump = load_dump(tmp_path / "npu.npz", SAMPLES)
    assert dump.samples == (True, True, False)
    assert dump.tensors(2) == {}
    assert dump.notes[1] == "npu.npz holds 2 of 3 samples: the others have none"


def test_a_folder_of_npy_files_is_named_by_tensor(tmp_path: Path) -> None:
    np.save(tmp_path / "conv_out.npy", np.stack([tensors(i)["/conv/out"] for i in range(3)]))
    np.save(tmp_path / "logits.npy", np.stack([tensors(i)["logits"] for i in range(3)]))
    dump = load_dump(tmp_path, SAMPLES)
    assert dump.names == ("conv_out", "logits")
    assert np.array_equal(dump.tensors(1)["conv_out"], tensors(1)["/conv/out"])
    assert equal(dump.tensors(2, ["logits"]), {"logits": tensors(2)["logits"]})


def test_a_folder_of_npy_files_per_sample_is_read_as_well(tmp_path: Path) -> None:
    for at in (0, 1):
        (tmp_path / f"0{at}").mkdir()
        np.save(tmp_path / f"0{at}" / "logits.npy", tensors(at)["logits"])
    dump = load_dump(tmp_path, SAMPLES)
    assert dump.samples == (True, True, False)
    assert equal(dump.tensors(1), {"logits": tensors(1)["logits"]})


def test_with_one_sample_a_file_is_that_sample_whatever_the_leading_axes(tmp_path: Path) -> None:
    np.savez(tmp_path / "npu.npz", a=floats((7,)), b=floats((1, 2)))
    dump = load_dump(tmp_path / "npu.npz", ("sample 0",))
    assert dump.tensors(0)["a"].shape == (7,)


def test_a_dump_reads_files_when_asked_and_crosses_to_another_process(tmp_path: Path) -> None:
    dump = load_dump(npz_folder(tmp_path, [tensors(0), tensors(1)]), SAMPLES)
    copy = pickle.loads(pickle.dumps(dump))
    assert len(pickle.dumps(dump)) < 4096
    assert equal(copy.tensors(1), tensors(1))


# --------------------------------------------------------------------------------- damaged dumps


def test_pickled_objects_are_refused_unopened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "opened",))

    np.savez(tmp_path / "00.npz", y=np.array([Trap()], object))
    dump = load_dump(tmp_path, SAMPLES[:1])
    with pytest.raises(FeedError, match=r"00\.npz: 'y' holds text or pickled objects") as error:
        dump.tensors(0)
    assert "pickles are never opened" in error.value.hint
    assert not (tmp_path / "opened").exists()


def test_a_header_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "y.npy", floats((4, 4)))
    content = (tmp_path / "y.npy").read_bytes()
    (tmp_path / "y.npy").write_bytes(content.replace(b"(4, 4)", b"(9, 9)"))
    with pytest.raises(FeedError, match="needs 324 bytes, the file has 64"):
        load_dump(tmp_path, SAMPLES[:1]).tensors(0)


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (lambda _folder: None, "holds no dump: found nothing"),
        (lambda folder: (folder / "a.png").touch(), "holds no dump: found a.png"),
        (lambda folder: (folder / "a.npz").write_text("no"), "a.npz cannot be read as an .npz"),
        (lambda folder: np.savez(folder / "a.npz"), "a.npz holds 0 tensors"),
        (
            lambda folder: np.savez(folder / "a.npz", p=floats((3, 2)), q=floats((2, 2))),
            "'q' has 2 samples and 'p' 3, expected as many of each",
        ),
        (
            lambda folder: np.savez(folder / "a.npz", p=np.float32(1)),
            "'p' is a scalar, expected a leading sample axis for 3 samples",
        ),
    ],
)
def test_what_is_no_dump_is_refused_with_a_hint(fill: Any, message: str, tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(FeedError) as error:
        load_dump(tmp_path, SAMPLES)
    assert message in error.value.message
    assert error.value.hint


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FeedError, match="nowhere does not exist"):
        load_dump(tmp_path / "nowhere", SAMPLES)


# ----------------------------------------------------------------------------------------- names


def named(tmp_path: Path, *names: str) -> Dump:
    np.savez(tmp_path / "00.npz", **{name: np.float32([1]) for name in names})
    return load_dump(tmp_path, SAMPLES[:1])


def test_exact_names_come_first_and_sanitized_ones_are_said(tmp_path: Path) -> None:
    dump = named(tmp_path, "logits", "Block_0_Conv_Output_0")
    names = match_names(dump, ["/block.0/Conv_output_0", "logits", "other"])
    assert names.found == {"/block.0/Conv_output_0": "Block_0_Conv_Output_0", "logits": "logits"}
    assert names.unknown == ()
    assert names.notes == (
        "names in the dump are not exactly the model's: "
        "'Block_0_Conv_Output_0' for '/block.0/Conv_output_0'",
    )


def test_a_name_that_no_tensor_has_is_listed_with_the_nearest(tmp_path: Path) -> None:
    names = match_names(named(tmp_path, "logit5\n"), ["logits", "input"])
    assert names.found == {}
    assert names.unknown == (
        Skipped(
            name="logit5\\n",
            kind="tensor",
            model="",
            reason="dumped from the device, but no tensor's name; nearest: logits, input",
        ),
    )


def test_a_name_that_fits_several_tensors_is_not_guessed(tmp_path: Path) -> None:
    names = match_names(named(tmp_path, "a_b"), ["a/b", "a.b"])
    assert names.found == {}
    assert "may be any of a/b, a.b" in names.unknown[0].reason


def test_a_tensor_dumped_under_two_names_is_taken_once(tmp_path: Path) -> None:
    names = match_names(named(tmp_path, "A_B", "a/b"), ["a/b"])
    assert names.found == {"a/b": "a/b"}
    assert [(u.name, u.reason) for u in names.unknown] == [
        ("A_B", "dumped twice: a/b is there already")
    ]


# -------------------------------------------------------------------------------- shapes and values


@pytest.mark.parametrize(
    ("shape", "wanted", "move"),
    [
        ((1, 3, 2, 4), (1, 4, 3, 2), lambda a: np.moveaxis(a, -1, 1)),
        ((1, 4, 3, 2), (1, 3, 2, 4), lambda a: np.moveaxis(a, 1, -1)),
        ((3, 2, 4), (1, 4, 3, 2), lambda a: np.moveaxis(a[None], -1, 1)),
        ((1, 5, 4), (1, 4, 5), lambda a: np.moveaxis(a, -1, 1)),
        ((1, 2, 3, 4, 5), (1, 5, 2, 3, 4), lambda a: np.moveaxis(a, -1, 1)),
        ((5,), (1, 5), lambda a: a[None]),
        ((1, 1, 5), (5,), lambda a: a[0, 0]),
    ],
)
def test_another_layout_is_brought_into_the_tensors_and_said(
    shape: Any, wanted: Any, move: Any
) -> None:
    array = floats(shape)
    found = fitted(array, wanted)
    assert found is not None
    assert found[0].shape == wanted
    assert np.array_equal(found[0], move(array))
    assert str(shape) in found[1]


def test_the_same_shape_is_left_alone_in_silence() -> None:
    array = floats((1, 3, 3, 3))
    found = fitted(array, (1, 3, 3, 3))
    assert found is not None
    assert (found[0] is array, found[1]) == (True, "")


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [((1, 6), (2, 3)), ((2, 5), (1, 5)), ((4, 3), (3, 4)), ((1, 2, 3, 4), (1, 3, 2, 4))],
)
def test_a_shape_that_no_layout_explains_fits_nothing(shape: Any, wanted: Any) -> None:
    assert fitted(floats(shape), wanted) is None


def qparams(scale: float = 0.1, zero_point: int = 3, dtype: str = "int8") -> QParams:
    return QParams(
        scale=np.array(np.float32(scale), np.float64),
        zero_point=np.array(zero_point, np.int64),
        dtype=dtype,
    )


def test_integers_are_codes_and_floats_are_real_already() -> None:
    codes = np.array([-128, 3, 127], np.int8)
    real = (codes.astype(np.float64) - 3) * np.float64(np.float32(0.1))
    assert np.array_equal(real_values(codes, qparams()), real)
    # Some tools dump int8 codes as wider integers.
    assert np.array_equal(real_values(codes.astype(np.int32), qparams()), real)
    already = np.float32([1.5, -2])
    assert real_values(already, qparams()) is already
    assert np.array_equal(real_values(codes, None), [-128.0, 3.0, 127.0])
    assert real_values(np.zeros((0, 2), np.int8), qparams()).shape == (0, 2)


def test_integers_that_are_no_codes_of_the_type_are_refused() -> None:
    with pytest.raises(FeedError, match="reach from 0 to 200, expected codes of int8: -128 to 127"):
        real_values(np.array([0, 200], np.uint8), qparams())
    with pytest.raises(FeedError, match="reach from -129 to 0"):
        real_values(np.array([-129, 0], np.int16), qparams())


# ------------------------------------------------------------------------------------------ totals


def decibels(reference: Any, actual: Any) -> float:
    x, y = np.asarray(reference, np.float64), np.asarray(actual, np.float64)
    return float(10 * np.log10(np.sum(x * x) / np.sum((x - y) ** 2)))


def watched(*samples: tuple[Any, Any, Any, Any]) -> DeviceError:
    watch = DeviceWatch("y", "y_DQ", "Y_0")
    for sample in samples:
        watch.add(*sample)
    found = watch.error()
    assert isinstance(found, DeviceError)
    return found


def steps(seed: int, gains: tuple[float, float, float]) -> tuple[Any, Any, Any, Any]:
    """Float, simulated, deployed, device: each the one before plus noise of its gain."""
    arrays = [floats((1, 4, 5), seed)]
    for at, gain in enumerate(gains):
        arrays.append(arrays[-1] + floats((1, 4, 5), 100 + 10 * seed + at, gain))
    return (arrays[0], arrays[1], arrays[2], arrays[3])


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ((0.1, 0.01, 0.001), "quantization"),
        ((0.01, 0.1, 0.001), "kernel"),
        ((0.01, 0.001, 0.1), "device"),
    ],
)
def test_the_step_with_the_most_noise_is_the_verdict_over_all_samples(
    gains: tuple[float, float, float], verdict: str
) -> None:
    samples = [steps(seed, gains) for seed in range(3)]
    found = watched(*samples)
    whole = [np.stack([s[at] for s in samples]) for at in range(4)]
    assert found.quantization_sqnr_db == pytest.approx(decibels(whole[0], whole[1]), abs=1e-9)
    assert found.kernel_sqnr_db == pytest.approx(decibels(whole[1], whole[2]), abs=1e-9)
    assert found.device_sqnr_db == pytest.approx(decibels(whole[2], whole[3]), abs=1e-9)
    assert found.total_sqnr_db == pytest.approx(decibels(whole[0], whole[3]), abs=1e-9)
    assert (found.verdict, found.samples) == (verdict, 3)
    assert (found.name, found.quantized_name, found.device_name) == ("y", "y_DQ", "Y_0")


def test_without_deployed_values_the_device_is_held_against_the_simulated_ones() -> None:
    reference, simulated, _, device = steps(0, (0.001, 0.0, 0.1))
    found = watched((reference, simulated, None, device))
    assert found.kernel_sqnr_db is None
    assert found.device_sqnr_db == pytest.approx(decibels(simulated, device), abs=1e-9)
    assert found.verdict == "device"


def test_deployed_values_of_some_samples_only_are_not_mixed_with_the_others() -> None:
    first, (reference, simulated, _, device) = (steps(s, (0.01, 0.1, 0.02)) for s in (0, 1))
    found = watched(first, (reference, simulated, None, device))
    assert found.kernel_sqnr_db is None
    both = np.stack([first[1], simulated]), np.stack([first[3], device])
    assert found.device_sqnr_db == pytest.approx(decibels(*both), abs=1e-9)


def test_where_nothing_differs_the_verdict_is_exact() -> None:
    x = floats((2, 3))
    found = watched((x, x, x, x))
    assert found.verdict == "exact"
    assert found.total_sqnr_db == math.inf


def test_the_verdict_is_the_step_that_brings_in_nan() -> None:
    x = floats((6,))
    noisy = x + np.float32(10)
    broken = noisy.copy()
    broken[2] = np.nan
    found = watched((x, noisy, noisy, broken))
    assert found.verdict == "device"
    assert math.isnan(found.device_sqnr_db)
    found = watched((x, x, broken, broken))
    assert found.verdict == "kernel"


def test_nan_that_the_float_model_has_itself_is_nobodys_noise() -> None:
    x = floats((6,))
    x[1], x[2] = np.nan, np.inf
    device = x.copy()
    device[0] += 1
    found = watched((x, x, x, device))
    assert found.verdict == "device"
    assert watched((x, x, x, x)).verdict == "exact"


def test_equal_codes_are_exact_although_scales_are_rounded() -> None:
    # 0.1 is no float32: simulated values are rounded after multiplying, by DequantizeLinear.
    codes = np.arange(-128, 128).astype(np.int8).reshape(1, 4, 8, 8)
    simulated = (codes.astype(np.float32) - np.float32(3)) * np.float32(0.1)
    watch = DeviceWatch("y", "y", "y")
    watch.add(simulated, simulated, None, np.moveaxis(codes, 1, -1), qparams())
    found = watch.error()
    assert isinstance(found, DeviceError)
    assert found.verdict == "exact"
    assert list(watch.notes) == [
        "y: (1, 8, 8, 4) transposed to (1, 4, 8, 8): channels last to channels first"
    ]


def test_codes_that_do_not_fit_name_the_tensor() -> None:
    x = floats((2,))
    with pytest.raises(FeedError, match="'conv': the dumped uint8 values"):
        DeviceWatch("y", "y", "conv").add(x, x, None, np.array([0, 255], np.uint8), qparams())


def test_shapes_that_do_not_fit_are_a_record_with_a_reason() -> None:
    watch = DeviceWatch("y", "y", "conv")
    watch.add(floats((2, 3)), floats((2, 3)), None, floats((4, 4)))
    watch.add(floats((2, 3)), floats((2, 3)), None, floats((5, 5)))
    assert watch.error() == Skipped(
        name="conv",
        kind="tensor",
        model="",
        reason="shapes differ: here (2, 3), device (4, 4)",
    )
    nothing = DeviceWatch("y", "y", "conv").error()
    assert isinstance(nothing, Skipped)
    assert nothing.reason == "the dump holds it for no sample"
