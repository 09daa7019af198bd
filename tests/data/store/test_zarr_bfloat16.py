from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.core.dtype.common import DataTypeValidationError

from data.store.zarr_bfloat16 import BFloat16, from_float32, to_float32

ALL = np.arange(2**16, dtype=np.uint16)


def as_torch(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def test_every_pattern_has_torch_s_value() -> None:
    np.testing.assert_array_equal(to_float32(ALL), as_torch(ALL).float().numpy())


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_rounds_as_torch_does(values: list[float]) -> None:
    x = np.array(values, np.float32)
    expected = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(from_float32(x), expected)


def test_round_trip_of_every_pattern_that_is_a_number() -> None:
    numbers = ALL[~np.isnan(to_float32(ALL))]
    np.testing.assert_array_equal(from_float32(to_float32(numbers)), numbers)


def test_nan_stays_nan_and_is_never_rounded_to_infinity() -> None:
    worst = np.array([0x7F800001, 0xFFFFFFFF, 0x7FC00000], np.uint32).view(np.float32)
    assert np.isnan(to_float32(from_float32(worst))).all()


def test_on_disk_it_is_the_registered_name_and_little_endian_bits(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "a", shape=(2, 2), dtype=BFloat16(), compressors=None, fill_value=0)
    array[:] = np.array([[0x3F80, 0xC000], [1, 2]], np.uint16)
    assert json.loads((tmp_path / "a/zarr.json").read_text())["data_type"] == "bfloat16"
    assert (tmp_path / "a/c/0/0").read_bytes() == bytes.fromhex("803f 00c0 0100 0200")
    again = zarr.open_array(tmp_path / "a", mode="r")
    assert again.dtype == np.uint16
    assert as_torch(np.asarray(again[0])).tolist() == [1.0, -2.0]


@pytest.mark.parametrize("bits", [0, 0x8000, 0x3F80, 1, 0x7F7F, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFC1])
def test_scalars_survive_json(bits: int) -> None:
    told = json.loads(json.dumps(BFloat16().to_json_scalar(np.uint16(bits), zarr_format=3), allow_nan=False))
    assert BFloat16().from_json_scalar(told, zarr_format=3) == bits


def test_scalars_are_told_as_numbers() -> None:
    assert BFloat16().to_json_scalar(np.uint16(0x3FC0), zarr_format=3) == 1.5
    assert BFloat16().from_json_scalar(1.5, zarr_format=3) == 0x3FC0
    with pytest.raises(TypeError):
        BFloat16().from_json_scalar(None, zarr_format=3)


def test_uint16_arrays_stay_uint16(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "a", shape=(2,), dtype="uint16")
    assert json.loads((tmp_path / "a/zarr.json").read_text())["data_type"] == "uint16"
    assert type(array.metadata.data_type) is not BFloat16
    with pytest.raises(DataTypeValidationError):
        BFloat16.from_native_dtype(np.dtype("uint16"))


def test_zarr_format_2_is_refused() -> None:
    with pytest.raises(ValueError, match="format 3"):
        BFloat16().to_json(2)
