"""A headless Chromium for the tests, and where things are on a page of Bokeh."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

# a figure's view, wherever on the page it is
_VIEW = """
const figure = Bokeh.documents.map(d => d.get_model_by_name(arguments[0])).find(m => m);
const view = Bokeh.index.find_one(figure);
"""
_NO_OTHER_HOST = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"


def start_browser(width=1500, height=1050):
    """Chromium that can reach this machine only; skips where it or selenium is missing (fails in CI)."""
    fail = pytest.fail if os.environ.get("CI") else pytest.skip
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        fail("no headless browser: apt-get install chromium chromium-driver")
    try:
        from selenium import webdriver
    except ImportError:
        fail("selenium is not installed: pip install -e '.[dev]'")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        _NO_OTHER_HOST,
    ):
        options.add_argument(argument)
    options.add_argument(f"--window-size={width},{height}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def wait_for(condition, seconds=30, what="the page"):
    """What `condition` returns as soon as it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} did not come within {seconds} s"
        time.sleep(0.1)
    return found


def screenshot(driver, folder, name):
    """Keep a picture in FCUNET_SCREENSHOTS, if that is set, else in `folder`."""
    place = Path(os.environ.get("FCUNET_SCREENSHOTS", folder))
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{name}.png"
    driver.save_screenshot(str(path))
    return path


def other_hosts(driver):
    """Addresses on other machines that the pages so far have asked for."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [a for a in asked if not a.startswith(("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:"))]


def data_of(driver, source):
    """Columns of a named Bokeh data source, as plain lists."""
    text = driver.execute_script(
        "const s = Bokeh.documents.map(d => d.get_model_by_name(arguments[0])).find(m => m);"
        "if (!s) return null; const out = {};"
        "const plain = v => v && v.length !== undefined && typeof v !== 'string' ? Array.from(v) : v;"
        "for (const k of s.columns()) out[k] = Array.from(s.data[k]).map(plain);"
        "return JSON.stringify(out)",
        source,
    )
    return None if text is None else json.loads(text)


def pixel(driver, figure, x, y):
    """Where on the page the coordinates (x, y) of a named figure are."""
    return driver.execute_script(
        _VIEW + "const box = view.el.getBoundingClientRect(), f = view.frame;"
        "return [box.left + f.x_scale.compute(arguments[1]), box.top + f.y_scale.compute(arguments[2])]",
        figure,
        x,
        y,
    )


def click(driver, figure, x, y):
    _pointer(driver, [pixel(driver, figure, x, y)])


def drag(driver, figure, start, end):
    """From `start` to `end`, both (x, y), in steps as a hand does."""
    (x0, y0), (x1, y1) = start, end
    points = [(x0 + t * (x1 - x0), y0 + t * (y1 - y0)) for t in (0, 0.3, 0.6, 1.0)]
    _pointer(driver, [pixel(driver, figure, *p) for p in points])


def _pointer(driver, places):
    from selenium.webdriver import ActionChains

    chain = ActionChains(driver, duration=60)
    pointer = chain.w3c_actions.pointer_action
    pointer.move_to_location(*places[0])
    pointer.pointer_down()
    for place in places[1:]:
        pointer.move_to_location(*place)
    pointer.pointer_up()
    chain.perform()
