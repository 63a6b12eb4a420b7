"""Datacubes at a URL: a web server and an S3 server (moto) of this machine, and fsspec's memory."""

import asyncio
import functools
import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from distributed import Client
from flat_scan import draw_datacube

from fcunet import runner
from fcunet.config import Config, DetectionConfig
from fcunet.convert import convert
from fcunet.predict import predict
from fcunet.provenance import input_fingerprint
from fcunet.remote import Remote, local, place
from fcunet.schema import STRAIN_COMPONENTS
from fcunet.store import (
    DamagedBlockError,
    Layout,
    describe,
    open_datacube,
    open_results,
    open_truth,
    read_block,
    write_datacube,
)
from fcunet.tiles import StorageError, TileJob, process_tile
from fcunet.whereabouts import find_scan

pytest.importorskip("aiohttp")  # of the extra `remote`


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder to serve, with a scan in it."""
    root = tmp_path_factory.mktemp("served")
    truth = xr.Dataset({name: (("scan_y", "scan_x"), np.zeros((6, 10))) for name in STRAIN_COMPONENTS})
    write_datacube(root / "scan.zarr", draw_datacube(), truth=truth, layout=Layout((4, 4), (2, 2)))
    return root


@contextmanager
def served(root, list_folders=False):
    """Address of a web server that knows byte ranges, as nginx does."""
    from aiohttp import web

    loop, ready, port = asyncio.new_event_loop(), threading.Event(), []

    def serve():
        asyncio.set_event_loop(loop)
        app = web.Application()
        app.router.add_static("/", root, show_index=list_folders)
        site = web.AppRunner(app, access_log=None)
        loop.run_until_complete(site.setup())
        loop.run_until_complete(web.TCPSite(site, "127.0.0.1", 0).start())
        port.append(site.addresses[0][1])
        ready.set()
        loop.run_forever()
        loop.run_until_complete(site.cleanup())
        loop.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(30)
    yield f"http://127.0.0.1:{port[0]}"
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)


@pytest.fixture(scope="module")
def web_url(folder):
    with served(folder) as address:
        yield f"{address}/scan.zarr"


def stored_bytes(out):
    """Every chunk of the arrays of a run."""
    files = [p for p in out.rglob("*") if p.is_file() and "/c/" in p.as_posix()]
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


def in_memory(folder, name):
    import fsspec

    fsspec.filesystem("memory").put(str(folder / "scan.zarr"), f"/{name}/scan.zarr", recursive=True)
    return f"memory://{name}/scan.zarr"


# ---- opening


def test_open_datacube__at_a_url_is_that_of_the_path(folder, web_url):
    local, remote = open_datacube(folder / "scan.zarr"), open_datacube(web_url)
    assert remote["intensity"].chunks == local["intensity"].chunks
    xr.testing.assert_identical(remote.compute(), local.compute())
    xr.testing.assert_identical(
        remote.isel(scan_y=3, scan_x=[1, 9]).compute(), local.isel(scan_y=3, scan_x=[1, 9]).compute()
    )


def test_open_datacube__through_any_file_system_of_fsspec(folder):
    url = in_memory(folder, "any")
    xr.testing.assert_identical(open_datacube(url).compute(), open_datacube(folder / "scan.zarr").compute())
    assert describe(url)["also"] == "probe, truth"


def test_fingerprint__of_a_copy_at_a_url_is_the_same(folder, web_url):
    assert input_fingerprint(web_url) == input_fingerprint(folder / "scan.zarr")


def test_truth__is_read_where_the_server_lists_folders(folder):
    with served(folder, list_folders=True) as address:
        xr.testing.assert_identical(open_truth(f"{address}/scan.zarr"), open_truth(folder / "scan.zarr"))


def test_datacube__travels_without_its_connections(web_url):
    remote = open_datacube(web_url)
    again = pickle.loads(pickle.dumps(remote))
    np.testing.assert_array_equal(again["intensity"][0, 3].values, remote["intensity"][0, 3].values)
    assert pickle.loads(pickle.dumps(place(web_url))) == place(web_url)


def test_a_missing_shard__is_no_block_of_zeros(folder):
    import fsspec

    url = in_memory(folder, "damaged")
    fsspec.filesystem("memory").rm("/damaged/scan.zarr/intensity/c/0/1/0/0")
    with pytest.raises(DamagedBlockError, match=r"block \(0, 1\).*the file is missing"):
        read_block(url, 0, 1)
    fsspec.filesystem("memory").pipe("/damaged/scan.zarr/intensity/c/0/1/0/0", b"nonsense" * 100)
    with pytest.raises(DamagedBlockError, match=r"block \(0, 1\).*does not decode"):
        read_block(url, 0, 1)


# ---- sentences


@pytest.mark.parametrize(
    ("url", "error", "words"),
    [
        ("http://127.0.0.1:9/scan.zarr", ConnectionError, "cannot be reached from .*127.0.0.1"),
        ("memory://nowhere/scan.zarr", FileNotFoundError, "no Zarr store.*check the name"),
        ("nosuch://bucket/scan.zarr", ValueError, "Protocol not known: nosuch; known are s3://"),
        ("gs://bucket/scan.zarr", ImportError, "gcsfs is needed; type: pip install gcsfs"),
        ("s3:/bucket/scan.zarr", ValueError, "was a URL until it became a Path; give it as text"),
    ],
)
def test_what_cannot_be_opened__is_said_in_a_sentence(url, error, words):
    if url.startswith("gs"):
        pytest.importorskip("fsspec")
        if "gcsfs" in sys.modules:
            pytest.skip("gcsfs is installed")
    with pytest.raises(error, match=words):
        open_datacube(url)


def test_s3__without_s3fs_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"s3fs is needed; type: pip install 'fcunet\[remote\]'"):
        open_datacube("s3://bucket/scan.zarr", storage_options={"anon": True, "skip_instance_cache": True})


def test_a_server_without_byte_ranges__is_refused(folder):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ValueError, match="no HTTP range requests"):
            open_datacube(f"http://127.0.0.1:{server.server_port}/scan.zarr")
        server.shutdown()


def test_credentials__are_refused_among_what_is_kept(tmp_path):
    with pytest.raises(ValueError, match="key, client_kwargs.token must not be") as caught:
        Config.load(store="s3://b/a.zarr", storage_options={"key": "AKIA", "client_kwargs": {"token": "t"}})
    assert "AKIA" not in str(caught.value)
    with pytest.raises(ValueError, match="password or a query") as caught:
        Config.load(store="https://me:hush@host/a.zarr")
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "write",
    [
        lambda url: write_datacube(url, draw_datacube()),
        lambda url: convert("scan.mib", url),
        lambda url: convert(url, "here.zarr"),
        lambda url: Config.load(store="a.zarr", out=url),
        lambda url: open_results(url),
        lambda url: runner.rerun_strain(url),
    ],
)
def test_what_must_be_here__is_said(write):
    with pytest.raises(ValueError, match="URL"):
        write("s3://bucket/scan.zarr")


def test_local__names_a_url_as_it_was_before_it_became_a_path():
    with pytest.raises(ValueError, match=r"^s3://bucket/run is a URL; not here$"):
        local(Path("s3://bucket/run"), "not here")


def test_config__keeps_a_url_and_its_options(tmp_path):
    config = Config.load(store="s3://bucket/scan.zarr/", storage_options={"anon": True})
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    again = Config.load(tmp_path / "c.yaml")
    assert (again.store, again.storage_options) == ("s3://bucket/scan.zarr", {"anon": True})


# ---- runs


def test_run__over_the_web_gives_the_bytes_of_the_local_run(small_run, tmp_path, monkeypatch):
    store, run_here = small_run
    monkeypatch.setattr(runner, "_write_report", lambda out: out / "report.html")
    settings = {"processes": False, "n_workers": 1, "threads_per_worker": 1}
    with served(store.parent) as address, Client(**settings, dashboard_address="127.0.0.1:0") as client:
        url = f"{address}/{store.name}"
        config = Config.load(store=url, out=tmp_path / "run", method="correlation")
        tree = runner.run(config, client=client, progress=False)
        assert find_scan(tmp_path / "run", tree)[0] == Remote(url)
    assert stored_bytes(tmp_path / "run") == stored_bytes(run_here)
    kept = json.dumps({k: str(v) for k, v in tree.attrs.items()})
    assert "127.0.0.1" not in kept


def test_a_worker_that_cannot_read_the_url__says_so():
    job = TileJob(
        Remote("memory://elsewhere/scan.zarr"), ".", (0, 0), DetectionConfig(), weights_sha256=None, run_id=""
    )
    with pytest.raises(StorageError, match=r"cannot read memory://elsewhere.*Every worker reads the scan"):
        process_tile(job, 0, 0)


# ---- S3, as a user meets it: the command, a bucket, workers in other processes


@pytest.fixture(scope="module")
def bucket(small_run):
    """Environment in which ``s3://scans`` holds the scan of `small_run`, on a server of this machine."""
    s3fs = pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    system = s3fs.S3FileSystem(key="testing", secret="hush-hush", endpoint_url=address)
    system.mkdir("scans")
    system.put(str(small_run[0]), "scans/scan.zarr", recursive=True)
    yield {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "hush-hush",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address,
    }
    server.stop()


@pytest.mark.slow
def test_s3__the_command_gives_the_bytes_of_the_local_run_and_keeps_no_secret(small_run, bucket, tmp_path):
    command = ["run", "s3://scans/scan.zarr", "--method", "correlation", "--workers", "1", "--out", "there"]
    done = subprocess.run(
        [sys.executable, "-c", "from fcunet.cli import main; main()", *command],
        capture_output=True, text=True, env=os.environ | bucket, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = tmp_path / "there"
    assert stored_bytes(out) == stored_bytes(small_run[1])
    assert (out / "detection.png").is_file()  # the report found the scan
    secrets = [bucket["AWS_SECRET_ACCESS_KEY"].encode(), bucket["AWS_ENDPOINT_URL"].encode()]
    assert not [p for p in out.rglob("*") if p.is_file() and any(s in p.read_bytes() for s in secrets)]


@pytest.mark.slow
def test_s3__dry_run_measures_and_what_is_wrong_is_said(bucket, monkeypatch):
    for name, value in bucket.items():
        monkeypatch.setenv(name, value)
    found = predict(Config.load(store="s3://scans/scan.zarr", method="correlation"), seconds=0.1)
    assert found.measured.read_s > 0
    with pytest.raises(FileNotFoundError, match="s3://nobucket/scan.zarr cannot be opened: The specified"):
        open_datacube("s3://nobucket/scan.zarr")
    with pytest.raises(FileNotFoundError, match="no Zarr store at s3://scans/other.zarr"):
        open_datacube("s3://scans/other.zarr")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(PermissionError, match="credentials.*--storage-option anon=true"):
        open_datacube("s3://scans/scan.zarr", storage_options={"skip_instance_cache": True})
