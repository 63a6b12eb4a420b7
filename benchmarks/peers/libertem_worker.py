"""What runs inside the environment of LiberTEM-blobfinder (protocol.py): detection as its notebooks do.

Imports nothing of ours. LiberTEM's vectors are (y, x), as ours. It takes the lattice from the mean pattern
and looks for a disk at each of its sites, in the logarithm of the counts; it has no strain.
"""

import numpy as np
from libertem.api import Context
from libertem.executor.inline import InlineJobExecutor
from libertem_blobfinder.common import fullmatch, patterns
from libertem_blobfinder.common.correlation import get_peaks
from libertem_blobfinder.udf.refinement import run_refine
from protocol import best_cpu_seconds, main, options_of, padded


def match_pattern(kind, given, search):
    """What to correlate with: the probe itself, or one of LiberTEM's disks of the same radius."""
    radius = float(given["radius_px"])
    if kind == "probe":
        probe, half = np.asarray(given["probe"], dtype=np.float32), int(np.ceil(search))
        offset = np.array(probe.shape) // 2 - given["origin"]
        wave = np.add.outer(*(np.fft.fftfreq(n) * o for n, o in zip(probe.shape, offset, strict=True)))
        centred = np.fft.ifft2(np.fft.fft2(probe) * np.exp(-2j * np.pi * wave)).real.astype(np.float32)
        cut = tuple(slice(max(n // 2 - half, 0), n // 2 + half) for n in probe.shape)
        return patterns.UserTemplate(centred[cut], search=search)
    kinds = {
        "background": patterns.BackgroundSubtraction,
        "gradient": patterns.RadialGradient,
        "gradient_background": patterns.RadialGradientBackgroundSubtraction,
    }
    return kinds[kind](radius=radius, search=search)


def detect(given):
    """Disks at the sites of the lattice of the mean pattern: those that LiberTEM used in its fit."""
    options = options_of(given)
    cube = np.asarray(given["patterns"], dtype=np.float32)
    shape = cube.shape[:2]
    context = Context(executor=InlineJobExecutor(inline_threads=1))
    template = match_pattern(options["template"], given, options["search"])
    mean = cube.mean((0, 1))
    matcher = fullmatch.FullMatcher(
        min_weight=options["min_weight"],
        tolerance=options.get("tolerance", 3),
        min_delta=2 * float(given["radius_px"]),
    )
    sites = get_peaks(mean, template, options["num_peaks"])
    found, _, _ = matcher.full_match(sites, zero=options.get("zero"))
    if not found:
        raise RuntimeError(
            "LiberTEM found no lattice in the mean pattern; give options zero, min_weight, num_peaks"
        )
    zero, a, b = (np.asarray(getattr(found[0], name)) for name in ("zero", "a", "b"))

    def run(part):
        data = context.load("memory", data=part, sig_dims=2, num_partitions=1)
        return run_refine(
            context,
            data,
            zero,
            a,
            b,
            template,
            matcher,
            correlation="fast",
            match="fast",
            upsample=options["upsample"],
        )

    (result, indices), seconds = best_cpu_seconds(
        lambda: run(cube), given["repeats"], warm_up=lambda: run(cube[:1, :2])
    )
    buffers = {
        name: np.asarray(result[name].data).reshape(-1, *result[name].data.shape[2:]) for name in result
    }
    used = buffers["selector"]
    peaks = [
        np.column_stack([buffers["refineds"][n][used[n]], buffers["peak_values"][n][used[n]]])
        for n in range(len(used))
    ]
    lattice = np.stack([buffers["a"], buffers["b"]], 1).reshape(*shape, 2, 2)
    return padded(peaks, shape) | {
        "lattice": lattice,
        "origin": buffers["zero"].reshape(*shape, 2),
        "cpu_seconds": seconds,
    }


if __name__ == "__main__":
    main({"detect": detect})
