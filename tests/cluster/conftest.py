"""A real SLURM for the tests in this folder, up before the first and down after the last."""

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

LAB = Path(__file__).parents[2] / "cluster" / "slurm-lab" / "slurm-lab.sh"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")


def free_ports(n: int = 16) -> int:
    """First of `n` ports in a row that are free on loopback."""
    for first in range(27000, 32000, 100):
        held: list[socket.socket] = []
        try:
            for port in range(first, first + n):
                held.append(socket.socket())
                held[-1].bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
        finally:
            for one in held:
                one.close()
    raise RuntimeError("no free block of ports")


@pytest.fixture(scope="session")
def slurm():
    """SLURM_CONF points to a running lab; yields its folder. In CI its absence is a failure, not a skip."""
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        text = f"no SLURM here ({', '.join(missing)} missing); cluster/slurm-lab/slurm-lab.sh install gets it"
        pytest.fail(text) if os.environ.get("CI") else pytest.skip(text)
    folder = tempfile.mkdtemp(
        prefix="slurm-", dir="/tmp"
    )  # short and open: munged and unix sockets want that
    os.chmod(folder, 0o755)
    environment = os.environ | {"SLURMLAB_DIR": folder, "SLURMLAB_PORT0": str(free_ports())}
    subprocess.run([LAB, "up"], env=environment, check=True, timeout=60)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = f"{folder}/etc/slurm.conf"
    try:
        yield Path(folder)
    finally:
        subprocess.run([LAB, "down"], env=environment, check=False, timeout=60)
        if before is None:
            os.environ.pop("SLURM_CONF", None)
        else:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(folder, ignore_errors=True)
