"""Blocks that take a while without taking the processor, so that a fault finds some in hand."""

import os
import time
from pathlib import Path

from fcunet import tiles

_WHOLE = tiles.process_tile


def slow_tile(job, iy, ix):
    time.sleep(float(os.environ.get("FCUNET_TEST_TILE_S", "0.15")))
    return _WHOLE(job, iy, ix)


def hungry_tile(job, iy, ix):
    """Block (1, 1) takes all the memory there is."""
    if (iy, ix) == (1, 1):
        held = []
        while True:
            held.append(bytearray(os.urandom(1 << 20)) * 64)
            time.sleep(0.1)
    return _WHOLE(job, iy, ix)


def whereabouts():
    """Process ids of a worker and its nanny, its job and its node; called on the worker."""
    return os.getpid(), os.getppid(), os.environ["SLURM_JOB_ID"], os.environ["SLURMD_NODENAME"]


def devices():
    """Job and GPU of a worker."""
    return os.environ["SLURM_JOB_ID"], os.environ["CUDA_VISIBLE_DEVICES"]


def end_process():
    os._exit(1)


def set_go(path):
    os.environ["FCUNET_TEST_GO"] = path


def set_pace(seconds):
    os.environ["FCUNET_TEST_TILE_S"] = seconds


def tracing_tile(job, iy, ix):
    """Each block leaves a file that is named after it and the GPU it had."""
    trace = f"{iy}-{ix}-{os.environ.get('CUDA_VISIBLE_DEVICES') or 'none'}"
    Path(os.environ["FCUNET_TEST_TRACE"], trace).touch()
    return _WHOLE(job, iy, ix)


def waiting_tile(job, iy, ix):
    """Blocks of the lower rows wait for a file; the others take their time."""
    flag = os.environ["FCUNET_TEST_GO"]
    while iy >= 2 and not os.path.exists(flag):
        time.sleep(0.1)
    return _WHOLE(job, iy, ix)
