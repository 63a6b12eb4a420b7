import errno
import getpass
import logging
import socket

import pytest

from fcunet.session import log_to, ways_to_dashboard
from fcunet.tiles import StorageError, full_disk_is_named

LINK = "http://127.0.0.1:8787/status"
WHO, HERE = getpass.getuser(), socket.gethostname()


@pytest.mark.parametrize(
    ("environment", "lines"),
    [
        ({}, []),
        ({"SSH_CONNECTION": "1"}, [f"ssh -N -L 8787:127.0.0.1:8787 {WHO}@{HERE} "]),
        (
            {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_HOST": "login1"},
            [f"ssh -N -L 8787:127.0.0.1:8787 -J {WHO}@login1 {WHO}@{HERE} "],
        ),
        ({"JUPYTERHUB_SERVICE_PREFIX": "/user/me/"}, ["/user/me/proxy/8787/status "]),
    ],
    ids=["at the machine", "by ssh", "in a job", "under JupyterHub"],
)
def test_ways_to_dashboard__are_those_of_where_the_user_sits(environment, lines):
    said = ways_to_dashboard(LINK, environment)
    assert len(said) == len(lines)
    for line, words in zip(said, lines, strict=True):
        assert words in line


def test_ways_to_dashboard__on_another_network_name_its_address():
    said = ways_to_dashboard(
        "http://10.1.2.3:40001/status", {"SSH_CONNECTION": "1", "JUPYTERHUB_SERVICE_PREFIX": "/"}
    )
    assert "/proxy/10.1.2.3:40001/status" in said[0]
    assert "-L 40001:10.1.2.3:40001 " in said[1]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk__is_named_with_what_to_do(number):
    with (
        pytest.raises(StorageError, match=r"cannot write to runs/a; make room .*quota"),
        full_disk_is_named("runs/a"),
    ):
        raise OSError(number, "no")


def test_full_disk__is_not_blamed_for_other_errors():
    with pytest.raises(PermissionError), full_disk_is_named("runs/a"):
        raise PermissionError(errno.EACCES, "no")


def test_log__on_a_full_disk_is_silent(tmp_path, capsys):
    with log_to(tmp_path / "run.log"):
        handler = logging.getLogger("fcunet").handlers[0]
        handler.stream.close()
        handler.stream = open("/dev/full", "w")  # noqa: SIM115
        logging.getLogger("fcunet.runner").info("hello")
        handler.stream = None
    assert "Traceback" not in capsys.readouterr().err
