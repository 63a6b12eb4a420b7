"""What one Dask task does: the patterns of one scan block in, padded peaks and virtual images out.

Plain arrays on both sides. This is the only place that knows about devices and batch sizes. A block goes
through in batches, the last one padded. No result depends on the block a pattern is in. On a CPU, correlation
does not depend on the batch size either; convolutions of a network round differently for each (by some 1e-6
px), so all its batches have one size.
"""

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from .config import DetectionConfig
from .kernels.peaks import Peaks
from .memory import keep_freed_memory
from .staging import Staging

logger = logging.getLogger(__name__)

Detector = Callable[[Tensor], Peaks]

PEAK_NAMES = ("peak_qy", "peak_qx", "peak_intensity", "peak_sigma")
VIRTUAL_NAMES = ("bf", "adf", "total", "com_qy", "com_qx")

_NEIGHBOURS = 8  # good pixels that stand in for a bad one
_MAX_BATCH = {"cpu": 64, "cuda": 512}
# pixels of a batch on the CPU: what fits the cache, as far as calls do not count; correlation cuts it further
_CPU_BATCH_PIXELS = {"fcunet": 2**18, "correlation": 2**20, "cepstral": 2**18}
# device memory per pixel of a pattern, bytes: float32 feature maps of the network, images and spectra of
# correlation
_BYTES_PER_PIXEL = {"fcunet": 1024, "correlation": 128, "cepstral": 256}

_STAGED = {"cuda"}  # devices that patterns are copied to one batch ahead
# One thread at a time on a GPU, while the others read and decompress: two would only add memory.
_DEVICE_PERMIT = threading.Semaphore(1)
_BUILD_LOCK = threading.Lock()
_DETECTORS: "OrderedDict[tuple[str, ...], Detector]" = OrderedDict()
_BATCH_LIMIT: dict[tuple[str, ...], int] = {}
_BLOCKS_AT_WORK, _THREADS_BEFORE = 0, 1


class BlockCalibration(Protocol):
    """What a block needs to know of the scan; :class:`fcunet.calibrate.Calibration` has it."""

    @property
    def centre(self) -> Any: ...
    @property
    def probe_radius_px(self) -> float: ...
    @property
    def edge_sigma_px(self) -> float: ...
    @property
    def probe(self) -> Any: ...
    @property
    def templates(self) -> Any: ...
    @property
    def template_index(self) -> Any: ...
    @property
    def bad_pixels(self) -> Any: ...
    @property
    def min_peak_spacing(self) -> Any: ...
    @property
    def edge_boundary(self) -> Any: ...
    @property
    def nearest_spacing_px(self) -> float: ...
    @property
    def origin(self) -> Any: ...
    @property
    def beam_energy_keV(self) -> float: ...
    @property
    def aperture_radius(self) -> float: ...


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; ``"auto"`` is the first CUDA device, or the CPU where there is none.

    Raises
    ------
    ValueError
        If CUDA is asked for by name and this process sees no CUDA device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {name!r} was asked for, but this process sees no CUDA device; "
            "use device='cpu', or ask the cluster for a GPU (--gres=gpu:1 in the profile)"
        )
    return device


def device_name(name: str = "auto") -> str:
    """What the device called `name` is, in words: "CPU", or the model of the GPU."""
    device = pick_device(name)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def build_detector(
    config: DetectionConfig,
    calibration: BlockCalibration,
    device: torch.device | str = "cpu",
    *,
    weights_sha256: str | None = None,
    template: np.ndarray | None = None,
) -> Detector:
    """A function from a batch of patterns to peaks, with everything it needs on `device`.

    Parameters
    ----------
    config : DetectionConfig
        `min_peak_spacing` and `edge_boundary` of None are taken from `calibration`.
    calibration : Calibration
        The vacuum probe and the measured numbers.
    device : torch.device
    weights_sha256 : str, optional
        Refuse network weights with another checksum.
    template : ndarray, shape (qy, qx), optional
        Probe to use instead of ``calibration.probe``.

    Returns
    -------
    callable
        ``detector(patterns) -> Peaks`` for float32 counts (n, qy, qx) on `device`.

    Raises
    ------
    ValueError
        For a probe without intensity, unknown weights or weights with another checksum.
    """
    device = torch.device(device)
    spacing = calibration.min_peak_spacing if config.min_peak_spacing is None else config.min_peak_spacing
    edge = calibration.edge_boundary if config.edge_boundary is None else config.edge_boundary
    shape_of_disk = calibration.probe if template is None else template
    probe = torch.as_tensor(np.ascontiguousarray(shape_of_disk, dtype=np.float32), device=device)
    if config.method == "correlation":
        from .kernels.correlation import DiskFinder, make_kernel

        return DiskFinder(
            make_kernel(probe, kernel=config.kernel, radii=config.kernel_radii),
            corr_power=config.corr_power,
            sigma_cc=config.sigma_cc,
            sigma_dp=config.sigma_dp,
            transform=config.transform,
            subpixel=config.subpixel,
            upsample_factor=config.upsample_factor,
            min_absolute_intensity=config.min_absolute_intensity,
            min_relative_intensity=config.min_relative_intensity,
            relative_to_peak=config.relative_to_peak,
            min_peak_spacing=float(spacing),
            edge_boundary=int(edge),
            max_num_peaks=config.max_num_peaks,
        )

    if config.method == "cepstral":
        from .kernels.cepstrum import find_cepstral_peaks

        def transform(patterns: Tensor) -> Peaks:
            return find_cepstral_peaks(
                patterns,
                radius_px=float(calibration.probe_radius_px),
                edge_sigma_px=float(calibration.edge_sigma_px),
                nearest_spacing_px=float(calibration.nearest_spacing_px),
                max_num_peaks=config.max_num_peaks,
                min_relative_intensity=config.min_relative_intensity,
            )

        return transform

    from .kernels.correlation import centre_probe
    from .nn.detect import detect
    from .nn.model import FCUNet
    from .nn.weights import load_model

    model = load_model(config.weights, device=device, precision=config.precision)
    if weights_sha256 is not None and model.info.sha256 != weights_sha256:
        raise ValueError(
            f"weights {config.weights!r} have SHA-256 {model.info.sha256[:12]} here, but the run was started "
            f"with {weights_sha256[:12]}; install the same weights on every node"
        )
    centred = centre_probe(probe)
    optics = torch.tensor([[calibration.beam_energy_keV, calibration.aperture_radius]], device=device)

    with torch.inference_mode():
        prepared = model.prepare(centred[None], centred) if isinstance(model, FCUNet) else centred

    def infer(patterns: Tensor) -> Peaks:
        return detect(
            model,
            patterns,
            prepared,
            optics=optics,
            threshold=config.threshold,
            min_peak_spacing=float(spacing),
            edge_boundary=int(edge),
            max_num_peaks=config.max_num_peaks,
        )

    return infer


def process_block(
    chunk: np.ndarray,
    config: DetectionConfig,
    calibration: BlockCalibration,
    *,
    origin: np.ndarray | None = None,
    template_index: np.ndarray | None = None,
    weights_sha256: str | None = None,
) -> dict[str, np.ndarray]:
    """Peaks and virtual images of one block of the scan.

    Parameters
    ----------
    chunk : ndarray, shape (by, bx, qy, qx)
        Counts in the detector's own dtype. NaN counts as a bad pixel of that one pattern.
    config : DetectionConfig
    calibration : Calibration
        Probe, centre, bad pixels (True = bad, replaced by the median of the nearest good ones) and radii, in
        px.
    origin : ndarray, shape (by, bx, 2), optional
        Beam centre (y, x) in px per position, where it moves over the scan; else ``calibration.centre``
        serves.
    template_index : ndarray of int, shape (by, bx), optional
        Which of ``calibration.templates`` serves as probe at each position; else ``calibration.probe`` does.
    weights_sha256 : str, optional
        Refuse network weights with another checksum.

    Returns
    -------
    dict of ndarray
        ``peak_qy, peak_qx, peak_intensity, peak_sigma`` float32 (by, bx, peak), NaN-padded, brightest first;
        ``n_peaks`` int16, ``truncated`` bool; ``shared_dilation_std, shared_dilation, bf, adf, total,
        com_qy, com_qx`` float32 (by, bx); ``sum`` float64 and ``maximum`` float32 (qy, qx) over the block. A
        pattern without counts has no peaks and NaN as centre of mass; a pattern of NaN is NaN throughout and
        not part of `sum` and `maximum`.

    Raises
    ------
    ValueError
        If `chunk` is not four-dimensional, or probe or bad pixels have another shape than its patterns.
    """
    if chunk.ndim != 4:
        raise ValueError(f"a block must be (scan_y, scan_x, qy, qx), but this one has shape {chunk.shape}")
    by, bx, *shape = chunk.shape
    for name in ("probe", "bad_pixels"):
        found = np.shape(getattr(calibration, name))
        if found != tuple(shape):
            raise ValueError(
                f"the {name} of the calibration has shape {found}, the patterns {tuple(shape)}; "
                "measure it on this datacube: calibration=fcunet.calibrate.calibrate(datacube)"
            )
    device = pick_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    patterns = chunk.reshape(-1, *shape)
    centres = np.broadcast_to(
        np.asarray(calibration.centre if origin is None else origin, float), (by, bx, 2)
    )
    centres = centres.reshape(-1, 2)
    choice = np.zeros(len(patterns), np.int64) if template_index is None else np.ravel(template_index)
    parts = []
    with _DEVICE_PERMIT if device.type == "cuda" else _one_core_each(), torch.inference_mode():
        for t in np.unique(choice):
            template = None if template_index is None else calibration.templates[t]
            key = _detector_key(config, calibration, device, weights_sha256, template)
            detector = _cached_detector(key, config, calibration, device, weights_sha256, template)
            some = choice == t
            one, at = (patterns, centres) if some.all() else (patterns[some], centres[some])
            parts.append((some, _in_batches(one, at, detector, config, calibration, device, key)))
    out = parts[0][1] if len(parts) == 1 else _joined(parts)
    return {k: v if k in ("sum", "maximum") else v.reshape(by, bx, *v.shape[1:]) for k, v in out.items()}


def _joined(parts: list[tuple[np.ndarray, dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    """Results of groups of patterns, each with a mask of where they belong, as those of all patterns."""
    out: dict[str, np.ndarray] = {}
    for name, first in parts[0][1].items():
        if name == "sum":
            out[name] = np.sum([values[name] for _, values in parts], axis=0)
        elif name == "maximum":
            out[name] = np.fmax.reduce([values[name] for _, values in parts])
        else:
            out[name] = np.empty((len(parts[0][0]), *first.shape[1:]), first.dtype)
            for some, values in parts:
                out[name][some] = values[name]
    return out


@contextmanager
def _one_core_each() -> Iterator[None]:
    """One torch thread per block: blocks run side by side, and shared FFTs round differently."""
    global _BLOCKS_AT_WORK, _THREADS_BEFORE
    with _BUILD_LOCK:
        if _BLOCKS_AT_WORK == 0:
            _THREADS_BEFORE = torch.get_num_threads()
        _BLOCKS_AT_WORK += 1
    torch.set_num_threads(1)  # in this thread; what others have is theirs
    try:
        yield
    finally:
        with _BUILD_LOCK:
            _BLOCKS_AT_WORK -= 1
            if _BLOCKS_AT_WORK == 0:
                torch.set_num_threads(_THREADS_BEFORE)


def _in_batches(
    patterns: np.ndarray,
    centres: np.ndarray,
    detector: Detector,
    config: DetectionConfig,
    calibration: BlockCalibration,
    device: torch.device,
    key: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """Run `detector` over all patterns, with batches halved as often as device memory demands."""
    n, shape = len(patterns), patterns.shape[1:]
    bad = np.asarray(calibration.bad_pixels, bool)
    reach = float(calibration.probe_radius_px) + 2 * float(calibration.edge_sigma_px)
    size = config.batch or min(_first_batch(config.method, shape, device), _BATCH_LIMIT.get(key, 2**31))
    # small whole numbers add up exactly in float32, in any order; others one by one, so that batches do not
    # matter
    exact = patterns.dtype.kind in "ui" and patterns.dtype.itemsize <= 2
    parts: list[dict[str, np.ndarray]] = []
    total, maximum = np.zeros(shape), np.full(shape, -np.inf, np.float32)
    start = 0
    staging = Staging(patterns, device) if device.type in _STAGED else None
    while start < n:
        stop = min(start + size, n)
        try:
            part, batch, lit = _one_batch(
                staging.take(start, stop, min(stop + size, n)) if staging else patterns[start:stop],
                centres[start:stop],
                size if config.method == "fcunet" else min(size, 1 << (stop - start - 1).bit_length()),
                detector,
                bad,
                reach,
                config.max_num_peaks,
                device,
            )
        except torch.cuda.OutOfMemoryError as err:
            if size == 1:
                raise MemoryError(f"one pattern of {shape} does not fit into the memory of {device}") from err
            size = _BATCH_LIMIT[key] = size // 2
            if staging is not None:
                staging.drop()
            torch.cuda.empty_cache()
            logger.warning("out of memory on %s: batches of %d patterns from here on", device, size)
            continue
        parts.append(part)
        if lit.any():
            _accumulate(total, batch[lit] if not lit.all() else batch, exact and stop - start <= 64)
            np.maximum(maximum, batch[lit].amax(0).cpu().numpy(), out=maximum)
        start = stop
    maximum[np.isneginf(maximum)] = np.nan
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]} | {"sum": total, "maximum": maximum}


def _one_batch(
    raw: np.ndarray | Tensor,
    centres: np.ndarray,
    size: int,
    detector: Detector,
    bad: np.ndarray,
    reach: float,
    max_num_peaks: int,
    device: torch.device,
) -> tuple[dict[str, np.ndarray], Tensor, Tensor]:
    """Results of one batch, its repaired patterns (m, qy, qx) on the device, and which hold numbers."""
    m = len(raw)
    batch = torch.zeros((size, *raw.shape[1:]), dtype=torch.float32, device=device)
    if isinstance(raw, Tensor):  # on the device already
        batch[:m] = raw
    else:  # by NumPy: torch takes twenty times as long to convert uint16 on a CPU
        batch[:m] = torch.from_numpy(raw.astype(np.float32))
    floats = raw.is_floating_point() if isinstance(raw, Tensor) else raw.dtype.kind == "f"
    lit = repair(batch[:m], bad) if bad.any() or floats else torch.ones(m, dtype=torch.bool)
    part = virtual_signals(batch[:m], centres, reach)
    dark = ~lit.cpu().numpy()
    for name in VIRTUAL_NAMES:
        part[name][dark] = np.nan
    peaks = detector(batch)
    empty = ~(part["total"] > 0)  # True for NaN too
    for name, values in zip(PEAK_NAMES, (peaks.qy, peaks.qx, peaks.intensity, peaks.sigma), strict=True):
        array = values[:m].float().cpu().numpy()
        if array.shape[1] != max_num_peaks:  # a detector may return fewer slots than the store has
            array = np.pad(array, ((0, 0), (0, max_num_peaks - array.shape[1])), constant_values=np.nan)
        array = np.array(array)
        array[empty] = np.nan
        part[name] = array
    part["n_peaks"] = np.where(empty, 0, peaks.n_peaks[:m].cpu().numpy()).astype(np.int16)
    part["truncated"] = peaks.truncated[:m].cpu().numpy() & ~empty
    for name in ("dilation_std", "dilation"):
        shared = getattr(peaks, name)[:m].float().cpu().numpy()
        part[f"shared_{name}"] = np.where(empty, np.float32(np.nan), shared)
    return part, batch[:m], lit


def virtual_signals(patterns: Tensor, centres: np.ndarray, radius_px: float) -> dict[str, np.ndarray]:
    """Total, bright field, dark field and centre of mass of patterns (n, qy, qx), float32 (n,) each.

    The bright field is the sum within `radius_px` of the centre (n, 2) in px (rounded to whole pixels), the
    dark field all the rest, the centre of mass in raw detector px, NaN without counts.
    """
    n, height, width = patterns.shape
    rows = patterns.sum(2).double().cpu().numpy()  # float32 sums along a line, float64 from there
    columns = patterns.sum(1).double().cpu().numpy()
    total = rows.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        com_qy = np.where(total > 0, (rows * np.arange(height)).sum(1) / total, np.nan)
        com_qx = np.where(total > 0, (columns * np.arange(width)).sum(1) / total, np.nan)
    reach = int(np.ceil(radius_px))
    offset = np.arange(-reach, reach + 1)
    disk = torch.as_tensor(np.hypot(offset[:, None], offset) <= radius_px, device=patterns.device)
    middle = torch.as_tensor(
        np.rint(np.nan_to_num(centres, nan=-1e6)).astype(np.int64), device=patterns.device
    )
    y = middle[:, 0, None] + torch.as_tensor(offset, device=patterns.device)  # (n, 2 reach + 1)
    x = middle[:, 1, None] + torch.as_tensor(offset, device=patterns.device)
    inside = disk & ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    index = torch.arange(n, device=patterns.device)[:, None, None]
    window = patterns[index, y.clamp(0, height - 1)[:, :, None], x.clamp(0, width - 1)[:, None, :]]
    bf = (window * inside).flatten(1).sum(1).double().cpu().numpy()
    values = {"bf": bf, "adf": total - bf, "total": total, "com_qy": com_qy, "com_qx": com_qx}
    return {name: value.astype(np.float32) for name, value in values.items()}


def repair(patterns: Tensor, bad_pixels: np.ndarray) -> Tensor:
    """Replace bad pixels and NaN, in place, by the median of the nearest good pixels of the same pattern.

    Parameters
    ----------
    patterns : Tensor, shape (n, qy, qx)
    bad_pixels : ndarray of bool, shape (qy, qx)
        True = bad in every pattern.

    Returns
    -------
    Tensor of bool, shape (n,)
        False for a pattern with no good pixel at all; it is set to 0.
    """
    flat = patterns.view(len(patterns), -1)
    _fill(flat, bad_pixels)
    good = torch.ones(len(patterns), dtype=torch.bool, device=patterns.device)
    if bad_pixels.all():
        return ~good
    # one NaN makes the sum NaN, and a sum is cheaper than looking at every pixel
    for i in torch.nonzero(~torch.isfinite(patterns.sum(2).sum(1))).flatten().tolist():
        broken = bad_pixels | ~torch.isfinite(patterns[i]).cpu().numpy()
        good[i] = not broken.all()
        _fill(flat[i : i + 1], broken)
    return good


def _fill(flat: Tensor, bad: np.ndarray) -> None:
    where, source = _replacements(bad.tobytes(), bad.shape)
    if where.size == 0:
        return
    index = torch.from_numpy(where).to(flat.device)
    if source.size == 0:
        flat[:, index] = 0
    else:
        ordered = flat[:, torch.from_numpy(source).to(flat.device)].sort(dim=2).values  # (n, b, k)
        k = source.shape[1]
        flat[:, index] = ordered[:, :, (k - 1) // 2 : k // 2 + 1].mean(2)


@lru_cache(maxsize=16)
def _replacements(bad: bytes, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices of bad pixels (b,), and of the good pixels nearest to each (b, k)."""
    mask = np.frombuffer(bad, bool).reshape(shape)
    where, good = np.argwhere(mask), np.argwhere(~mask)
    flat = np.ravel_multi_index((where[:, 0], where[:, 1]), shape)
    if len(where) == 0 or len(good) == 0:
        return flat, np.empty((len(where), 0), np.int64)
    k = np.arange(1, min(_NEIGHBOURS, len(good)) + 1)
    nearest = good[cKDTree(good).query(where, k=k)[1]]  # (b, k, 2)
    return flat, np.ravel_multi_index((nearest[..., 0], nearest[..., 1]), shape)


def _accumulate(total: np.ndarray, batch: Tensor, exact: bool) -> None:
    if exact:
        total += batch.sum(0).cpu().numpy()
    elif batch.device.type == "cuda":
        total += batch.sum(0, dtype=torch.float64).cpu().numpy()
    else:
        for pattern in batch.numpy():
            total += pattern


def _first_batch(method: str, shape: tuple[int, ...], device: torch.device) -> int:
    """Patterns per batch, a power of two: by cache on the CPU, by free memory on a GPU."""
    pixels = int(np.prod(shape))
    if device.type == "cuda":
        # cached blocks of torch's own allocator are free to us as well
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        limit = int(0.5 * free / (pixels * _BYTES_PER_PIXEL[method]))
    else:
        limit = _CPU_BATCH_PIXELS[method] // pixels
    limit = max(1, min(limit, _MAX_BATCH[device.type]))
    return 1 << (limit.bit_length() - 1)


def _detector_key(
    config: DetectionConfig,
    calibration: BlockCalibration,
    device: torch.device,
    sha256: str | None,
    template: np.ndarray | None,
) -> tuple[str, ...]:
    shape_of_disk = calibration.probe if template is None else template
    digest = hashlib.sha256(np.asarray(shape_of_disk, dtype=np.float32).tobytes())
    numbers = (
        calibration.min_peak_spacing,
        calibration.edge_boundary,
        calibration.beam_energy_keV,
        calibration.aperture_radius,
        calibration.probe_radius_px,
        calibration.edge_sigma_px,
        calibration.nearest_spacing_px,
    )
    digest.update(repr(numbers).encode())
    return config.model_dump_json(), digest.hexdigest(), str(device), sha256 or ""


def _cached_detector(
    key: tuple[str, ...],
    config: DetectionConfig,
    calibration: BlockCalibration,
    device: torch.device,
    sha256: str | None,
    template: np.ndarray | None,
) -> Detector:
    """The detector for `key`, built once per process."""
    with _BUILD_LOCK:
        if key not in _DETECTORS:
            # a notebook that tries parameters must not fill the device; one scan may have 16 templates
            while len(_DETECTORS) >= 20:
                _DETECTORS.popitem(last=False)
            _DETECTORS[key] = build_detector(
                config, calibration, device, weights_sha256=sha256, template=template
            )
        return _DETECTORS[key]


def weighted_sums(
    chunk: np.ndarray, shift: np.ndarray | None = None, *, weights: np.ndarray, mask: np.ndarray | None = None
) -> np.ndarray:
    """Sum of each pattern of `chunk` (..., qy, qx) times `weights` (qy, qx), float32.

    `shift` (..., 2) moves the weights along with the beam, (y, x) in px, to the nearest pixel; what comes to
    lie beyond the detector, or where `mask` is False, counts nothing.
    """
    flat = chunk.reshape(-1, weights.size)
    moves = np.zeros((len(flat), 2), int)
    if shift is not None:
        moves = np.rint(np.nan_to_num(shift)).astype(int).reshape(-1, 2)
    places: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    out = np.empty(len(flat), np.float32)
    for i, pattern in enumerate(flat):  # one by one: no copy of the block in float
        move = int(moves[i, 0]), int(moves[i, 1])
        if move not in places:
            places[move] = _moved(weights, mask, move)
        where, chosen = places[move]
        out[i] = np.dot(pattern[where].astype(np.float64), chosen)
    return out.reshape(chunk.shape[:-2])


def _moved(
    weights: np.ndarray, mask: np.ndarray | None, move: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Where `weights` are not zero after a move (flat indices), and their values there."""
    y, x = np.nonzero(weights)
    values = weights[y, x]
    y, x = y + move[0], x + move[1]
    on = (y >= 0) & (y < weights.shape[0]) & (x >= 0) & (x < weights.shape[1])
    if mask is not None:
        on[on] = mask[y[on], x[on]]
    return y[on] * weights.shape[1] + x[on], values[on]
