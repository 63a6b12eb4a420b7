"""A virtual environment per peer, made on first use and kept, because peers pin old versions."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

REQUIREMENTS = {"py4dstem": "py4DSTEM==0.14.18"}
_HERE = Path(__file__).resolve().parent


def environments() -> Path:
    """Folder of the environments: ``FCUNET_PEERS``, or ``runs/peers`` in the repository (ignored by git)."""
    return Path(os.environ.get("FCUNET_PEERS", _HERE.parents[1] / "runs" / "peers"))


def peer_python(peer: str, *, install: bool = True) -> Path | None:
    """Interpreter of the peer's environment, which is made with pip where it is missing.

    Returns None if it is missing and `install` is False.
    """
    requirement = REQUIREMENTS[peer]
    folder = environments() / requirement.replace("==", "-").lower()
    python = folder / "bin" / "python"
    ready = folder / "installed"
    if not ready.exists():
        if not install:
            return None
        print(f"installing {requirement} into {folder} (once, about a minute)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", requirement], check=True)
        ready.write_text(requirement + "\n")
    return python


def run_worker(peer: str, script: str, task: str, **arrays) -> dict[str, np.ndarray]:
    """Run ``script TASK INPUT.npz OUTPUT.npz`` in the environment of `peer`: arrays in, arrays out."""
    python = peer_python(peer)
    with tempfile.TemporaryDirectory() as folder:
        given, returned = Path(folder, "given.npz"), Path(folder, "returned.npz")
        np.savez(given, **arrays)
        env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
        env |= {"PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"}
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
