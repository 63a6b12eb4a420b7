"""Jobs of one minute, and work for two: each job is ended in the middle of a block, by SLURM or by itself.

Dask's own ways lose such a run: a backlog assigned at once is given up after the second walltime (resources,
with or without lifetime). The runs go on beside the other tests.
"""

import pytest
from lab import PATIENCE, assert_same_bytes

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900 * PATIENCE)]


@pytest.mark.parametrize("way", ["plain", "resources", "lifetime", "staggered"])
def test_run__outlives_the_walltime_of_its_jobs(way, walltime_runs, serial):
    future, out = walltime_runs[way]
    status, said = future.result()
    assert status == 0, said
    assert_same_bytes(out, serial)
    logs = [path.read_text() for path in (out / "jobs").glob("*.err")]
    # of two at a time, each; a job that ends itself is replaced as well
    word = "DUE TO TIME LIMIT" if way in ("plain", "resources") else "worker-lifetime-reached"
    assert sum(word in log for log in logs) >= 2, logs
