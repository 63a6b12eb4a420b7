"""A virtual environment per peer, made on first use and kept, because peers pin old versions of each other.

    python -m benchmarks.peers.environment            # install them all now (a few minutes, 3 GB)
    python -m benchmarks.peers.environment pyxem      # or one

A worker script runs inside: ``python WORKER.py TASK GIVEN RETURNED.npz`` reads the arrays ``GIVEN/*.npy``
(mapped, not copied) and writes its results as one npz. `run_worker` does that; `benchmarks.peers.detect`
is the call for disk detection.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Peer:
    """What pip installs. `bare`: without dependencies, which are listed by hand in `others`."""

    package: str
    others: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    on_top_of_ours: bool = False  # sees fcunet's own packages: NumPy 2, Zarr 3 and the same torch


# quantem asks for torchvision and tensorboard, and through them for CUDA packages; disk detection and strain
# need neither, so it is installed bare on top of the environment (and the torch) that fcunet runs in
PEERS = {
    "py4dstem": Peer("py4DSTEM==0.14.18"),
    "libertem": Peer("libertem-blobfinder[hdbscan]==0.6.1", others=("libertem==0.16.0",)),
    "pyxem": Peer("pyxem==0.21.0"),
    "quantem": Peer(
        "quantem==0.1.10",
        others=(
            *("ase>=3.23", "cmasher>=1.9.2", "colorspacious", "dill", "h5py>=3.13", "hdf5plugin>=6"),
            *("lightning-utilities", "optuna>=4.5", "rosettasciio>=0.8", "scikit-image>=0.25.2"),
            *("spglib>=2.5", "tensorboard>=2.19", "torchinfo>=1.8"),
        ),
        bare=("quantem==0.1.10", "torchmetrics>=1.7.3"),
        on_top_of_ours=True,
    ),
}
_HERE = Path(__file__).resolve().parent
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


def environments() -> Path:
    """Folder of the environments: ``FCUNET_PEERS``, or ``runs/peers`` in the repository (ignored by git)."""
    return Path(os.environ.get("FCUNET_PEERS", _HERE.parents[1] / "runs" / "peers"))


def peer_python(name: str, *, install: bool = True) -> Path | None:
    """Interpreter of the environment of a peer, which is made with pip where it is missing.

    Returns None if it is missing and `install` is False.
    """
    peer = PEERS[name]
    folder = environments() / peer.package.replace("[hdbscan]", "").replace("==", "-").lower()
    python, ready = folder / "bin" / "python", folder / "installed"
    if not ready.exists():
        if not install:
            return None
        print(f"installing {peer.package} into {folder} (once, a minute or more)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        if peer.on_top_of_ours:
            ours = [path for path in sys.path if Path(path).name == "site-packages"]
            (target,) = folder.glob("lib/python3*/site-packages")
            (target / "zz_fcunet.pth").write_text("\n".join(ours) + "\n")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        packages = peer.others if peer.bare else (*peer.others, peer.package)
        subprocess.run([*pip, *packages], check=True)
        if peer.bare:
            subprocess.run([*pip, "--no-deps", *peer.bare], check=True)
        ready.write_text(peer.package + "\n")
    return python


def run_worker(peer: str, script: str, task: str, **arrays) -> dict[str, np.ndarray]:
    """Run a worker script in the environment of `peer`: arrays in, arrays out.

    Parameters
    ----------
    peer : str
        Key of `PEERS`.
    script : str
        File beside this one.
    task : str
        Key of the script's ``TASKS``.
    **arrays
        What the task is given: arrays, numbers, strings, or paths of .npy files, which are not copied.

    Raises
    ------
    RuntimeError
        If the script fails, with the end of what it said.
    """
    python = peer_python(peer)
    with tempfile.TemporaryDirectory() as folder:
        given, returned = Path(folder, "given"), Path(folder, "returned.npz")
        given.mkdir()
        for name, value in arrays.items():
            file = given / f"{name}.npy"
            if isinstance(value, Path):
                file.symlink_to(value.resolve())
            else:
                np.save(file, value)
        env = os.environ | dict.fromkeys(_ONE_THREAD, "1")
        env |= {"MPLBACKEND": "Agg", "PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"}
        done = subprocess.run(
            [str(python), str(_HERE / script), task, str(given), str(returned)],
            capture_output=True,
            text=True,
            env=env,
            cwd=folder,
        )
        if done.returncode:
            raise RuntimeError(f"{script} {task} failed in the environment of {peer}:\n{done.stderr[-4000:]}")
        with np.load(returned) as found:
            return dict(found)


if __name__ == "__main__":
    for chosen in sys.argv[1:] or PEERS:
        print(peer_python(chosen))
