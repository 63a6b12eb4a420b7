"""The schema: one spelling of every name, and checks that say what is wrong."""

import numpy as np
import pytest
import xarray as xr

from fcunet import schema


def datacube(**changes):
    variables = {"intensity": (schema.DATACUBE_DIMS, np.zeros((2, 3, 4, 5), np.uint16))} | changes
    return xr.Dataset(variables)


def test_check_datacube__accepts_counts_and_floats():
    schema.check_datacube(datacube())
    schema.check_datacube(datacube(intensity=(schema.DATACUBE_DIMS, np.zeros((1, 1, 4, 5), np.float32))))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"intensity": (("scan_x", "scan_y", "qy", "qx"), np.zeros((2, 3, 4, 5), np.uint16))}, "needed are"),
        ({"intensity": (schema.DATACUBE_DIMS, np.zeros((2, 3, 4, 5), complex))}, "needed is kind 'uif'"),
        ({"probe": (("qx", "qy"), np.zeros((5, 4), np.float32))}, "'probe' in datacube has dimensions"),
        (
            {"detector_mask": (schema.PATTERN_DIMS, np.zeros((4, 5), np.uint8))},
            "'detector_mask' .* dtype uint8",
        ),
    ],
)
def test_check_datacube__names_variable_and_fault(changes, words):
    with pytest.raises(ValueError, match=words):
        schema.check_datacube(datacube(**changes))


def test_check_datacube__says_what_is_missing_and_what_is_there():
    with pytest.raises(ValueError, match="lacks intensity; it has counts"):
        schema.check_datacube(xr.Dataset({"counts": ("x", [1])}))


def test_check_variables__leaves_unknown_ones_alone():
    schema.check_datacube(datacube(thickness=(schema.SCAN_DIMS, np.ones((2, 3)))))


@pytest.mark.parametrize("kind", schema.FORMATS)
def test_format__attributes_are_accepted_back(kind):
    schema.check_format(schema.format_attrs(kind), kind)


def test_format__newer_other_and_foreign_stores_are_told_apart():
    newer = schema.format_attrs("peaks") | {"fcunet_format_version": schema.FORMAT_VERSION + 1}
    with pytest.raises(ValueError, match="upgrade with: pip install --upgrade fcunet"):
        schema.check_format(newer, "peaks", "a.zarr")
    with pytest.raises(ValueError, match="a.zarr is an fcunet peaks store, but a datacube store is needed"):
        schema.check_format(schema.format_attrs("peaks"), "datacube", "a.zarr")
    with pytest.raises(ValueError, match="is not an fcunet datacube store .* fcunet convert"):
        schema.check_format({}, "datacube")
    with pytest.raises(ValueError, match="unknown store kind 'movie'"):
        schema.format_attrs("movie")


@pytest.mark.parametrize("table", [schema.DATACUBE, schema.PEAKS, *schema.RESULT_GROUPS.values()])
def test_tables__names_are_keys_and_every_variable_is_described(table):
    for name, variable in table.items():
        assert name == variable.name
        assert variable.long_name
        assert len(set(variable.dims)) == len(variable.dims)


def test_tables__units_are_the_three_of_the_package():
    known = {None, "1", "rad", "counts", "px^2", schema.UNIT_SCAN, schema.UNIT_Q, schema.UNIT_PIXEL}
    tables = [schema.DATACUBE, schema.PEAKS, *schema.RESULT_GROUPS.values()]
    assert {variable.units for table in tables for variable in table.values()} <= known
