"""Counted data: lists of electrons per frame, as stempy stores them."""

import numpy as np
import pytest

from fcunet.convert import convert
from fcunet.readers.detect import open_source
from fcunet.readers.events import Events
from fcunet.store import block_grid, open_datacube

h5py = pytest.importorskip("h5py")


def write_events(path, lists, positions, *, scan=(3, 2), frame=(6, 5)):
    """`scan` and `frame` as stored: (Nx, Ny); `lists` holds flat pixel indices, one list per frame or row."""
    kind = h5py.vlen_dtype(np.uint32)
    several = len(lists[0]) if isinstance(lists[0], tuple) else 0
    with h5py.File(path, "w") as file:
        file.attrs["version"] = 3
        group = file.create_group("electron_events")
        frames = group.create_dataset("frames", (len(lists), several) if several else (len(lists),), kind)
        for n, events in enumerate(lists):
            for m, one in enumerate(events if isinstance(events, tuple) else (events,)):
                frames[(n, m) if several else n] = np.array(one, np.uint32)
        stored = group.create_dataset("scan_positions", data=np.array(positions, np.uint32))
        for item, (nx, ny) in ((stored, scan), (frames, frame)):
            item.attrs["Nx"], item.attrs["Ny"] = nx, ny
    return path


# position 3 has two frames, position 1 an empty one, position 4 none; they come in no order
LISTS = ((0, 7, 7), (29,), (), (3, 4), (3,), (12,))
POSITIONS = (3, 0, 1, 2, 3, 5)


def dense(lists, positions, n=6, frame=(6, 5)):
    cube = np.zeros((n, frame[0] * frame[1]), np.uint16)
    for events, position in zip(lists, positions, strict=True):
        for pixel in events:
            cube[position, pixel] += 1
    return cube.reshape(n, *frame)


def as_lists(lists):
    return [list(events) for events in lists]


def test_events__are_added_up_per_scan_position(tmp_path):
    source = open_source(write_events(tmp_path / "a.h5", as_lists(LISTS), POSITIONS))
    expected = dense(LISTS, POSITIONS)
    assert source.scan_shape == (2, 3)  # stored as (Nx, Ny) = (3, 2)
    assert source.data.shape == (6, 6, 5)
    np.testing.assert_array_equal(source.data[:], expected)
    np.testing.assert_array_equal(source.data[2:5], expected[2:5])
    np.testing.assert_array_equal(source.data[3], expected[3])
    assert "1 scan positions have no frame" in source.notes[0]


def test_events__of_several_frames_per_row_are_the_same(tmp_path):
    rows = [((29,), ()), ((), ()), ((3, 4), ()), ((0, 7, 7), (3,)), ((), ()), ((), (12,))]
    source = open_source(write_events(tmp_path / "a.h5", rows, range(6)))
    np.testing.assert_array_equal(source.data[:], dense(LISTS, POSITIONS))


def test_convert__events_become_a_datacube(tmp_path):
    convert(write_events(tmp_path / "a.h5", as_lists(LISTS), POSITIONS), tmp_path / "a.zarr")
    with open_datacube(tmp_path / "a.zarr") as cube:
        np.testing.assert_array_equal(cube["intensity"].values, dense(LISTS, POSITIONS).reshape(2, 3, 6, 5))


def test_convert__no_more_than_one_block_of_events_is_dense_at_once(tmp_path, monkeypatch):
    sizes, read = [], Events.__getitem__

    def watched(self, key):
        part = read(self, key)
        sizes.append(part.size // 30)
        return part

    monkeypatch.setattr(Events, "__getitem__", watched)
    convert(write_events(tmp_path / "a.h5", [[3]] * 64, range(64), scan=(8, 8)), tmp_path / "a.zarr")
    assert max(sizes) <= np.prod(block_grid(tmp_path / "a.zarr").block_shape) < 64


def test_events__outside_the_detector_or_the_scan_are_refused(tmp_path):
    beyond = open_source(write_events(tmp_path / "a.h5", [[30]], [0]))
    with pytest.raises(ValueError, match="pixel 30, beyond the 30"):
        beyond.data[:]
    with pytest.raises(ValueError, match="do not fit a scan of 2 x 3"):
        open_source(write_events(tmp_path / "b.h5", [[1]], [6]))
