"""The explorer in a headless Chromium: what a click, a drawn region and a virtual detector do to the page."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from browser import click, data_of, drag, other_hosts, screenshot, wait_for
from flat_scan import draw_datacube

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

_READY = "return !!(window.Bokeh && Bokeh.documents.length && Bokeh.documents[0].get_model_by_name('map'))"
_PRESS = """
function all(root, found = []) {
  for (const e of root.querySelectorAll('*')) { found.push(e); if (e.shadowRoot) all(e.shadowRoot, found); }
  return found;
}
all(document).find(e => e.children.length == 0 && e.textContent.trim() == arguments[0]).click();
"""


@pytest.fixture(scope="module")
def address(small_run):
    """``fcunet explore`` of the small run, in a process of its own."""
    command = [str(Path(sys.executable).with_name("fcunet")), "explore", str(small_run[1]), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, line + process.communicate()[0]
        yield found.group(0)
        process.terminate()


@pytest.fixture
def page(browser, address):
    browser.get(address)
    wait_for(lambda: browser.execute_script(_READY), 60, "the explorer")
    wait_for(lambda: data_of(browser, "map-data")["image"][0], 30, "the map")
    return browser


def image(page, name):
    return np.array(data_of(page, name)["image"][0], dtype=float)


def press(page, label):
    page.execute_script(_PRESS, label)


def test_page__a_click_shows_the_pattern_of_that_position(page, tmp_path):
    before = image(page, "pattern-data")
    click(page, "map", 14.0, 4.0)  # nm: column 7, row 2
    wait_for(lambda: data_of(page, "position") == {"x": [14], "y": [4]}, what="the cross")
    wait_for(lambda: not np.array_equal(image(page, "pattern-data"), before), what="another pattern")
    expected = draw_datacube()["intensity"][2, 7].values.astype(float) ** 0.4
    np.testing.assert_allclose(image(page, "pattern-data"), expected.ravel(), rtol=1e-5)
    assert len(data_of(page, "pattern-peaks")["x"]) > 4
    assert screenshot(page, tmp_path, "explorer").stat().st_size > 30_000


def test_page__a_drawn_region_becomes_the_reference_at_once(page, tmp_path):
    before = image(page, "map-data")
    press(page, "reference")
    drag(page, "map", (4.0, 2.0), (8.0, 8.0))  # columns 2 to 4, rows 1 to 4
    wait_for(lambda: not np.array_equal(image(page, "map-data"), before, equal_nan=True), what="new strain")
    strain = image(page, "map-data").reshape(6, 10)
    assert abs(np.nanmedian(strain[1:5, 2:5])) < 0.05
    assert data_of(page, "reference") == {"left": [3], "right": [9], "top": [1], "bottom": [9]}
    screenshot(page, tmp_path, "explorer-reference")


def test_page__a_ring_drawn_on_the_mean_pattern_gives_its_image(page, tmp_path):
    press(page, "mean pattern, virtual detector")
    wait_for(
        lambda: page.execute_script(
            "return !!Bokeh.index.find_one(Bokeh.documents[0].get_model_by_name('mean'))"
        )
    )
    drag(page, "mean", (32.0, 32.0), (38.0, 32.0))
    wait_for(lambda: data_of(page, "mean-ring")["outer"], what="the ring")
    title = "return Bokeh.documents[0].get_model_by_name('map').title.text"
    wait_for(lambda: page.execute_script(title) == "virtual detector", what="the image")
    ring = data_of(page, "mean-ring")
    distance = np.hypot(np.arange(64)[:, None] - ring["y"][0], np.arange(64) - ring["x"][0])
    expected = draw_datacube()["intensity"].values[..., distance < ring["outer"][0]].sum(-1)
    np.testing.assert_array_equal(image(page, "map-data").reshape(6, 10), expected)
    screenshot(page, tmp_path, "explorer-detector")


def test_page__asks_no_other_host(page):
    assert other_hosts(page) == []
