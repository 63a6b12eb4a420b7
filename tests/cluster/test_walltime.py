"""Jobs of one minute, and work for longer: each is ended by SLURM in the middle of a block."""

import pytest
from lab import assert_same_bytes, finish

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_run__outlives_the_walltime_of_its_jobs(walltime_run, serial):
    process, out = walltime_run
    finish(process)
    ended = [p for p in (out / "jobs").glob("*.err") if "DUE TO TIME LIMIT" in p.read_text()]
    assert len(ended) >= 2  # of two at a time, each
    assert_same_bytes(out, serial)
