"""What each weight matrix of a model looks like to a quantizer: kurtosis, outliers, ranges, SQNR at low bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .. import run_folder
from ..errors import UserError
from ..methods.kurtosis import kurtosis
from ..models.loading import pretrained_matrices
from ..quantizers import numeric

BITS = (8, 4, 3, 2)
GRANULARITIES, RANGES = ("tensor", "channel"), ("absmax", "mse")
BINS = 81  # odd: one bin around zero

Way = tuple[str, str]  # granularity, range
WAYS: tuple[Way, ...] = tuple((granularity, range_) for granularity in GRANULARITIES for range_ in RANGES)


@dataclass(frozen=True, eq=False)
class WeightStatistics:
    """Of one matrix [in, out]; `kurtosis`, `std` in float64, ranges in units of the weight.

    `mse_range`: {bits: per tensor}; `sqnr`: {(granularity, range): {bits: dB, inf where nothing is lost}};
    `histogram`: counts in BINS equal bins over ±`histogram_peak`.
    """

    name: str
    shape: tuple[int, int]
    kurtosis: float
    std: float
    absmax: float
    mse_range: dict[int, float]
    sqnr: dict[Way, dict[int, float]]
    histogram: np.ndarray
    histogram_peak: float

    @property
    def absmax_over_std(self) -> float:
        """How many standard deviations the largest weight is; 0 for a constant matrix."""
        return self.absmax / self.std if self.std > 0 else 0.0


def matrices(model: str) -> dict[str, np.ndarray]:
    """{layer: float32 [in, out]} of a model name, a model folder, or a run's best model: Linears and embeddings.

    In the model's order. Raises UserError for a model that is not there, or has weights that are not finite.
    """
    source = str(Path(model, run_folder.BEST)) if run_folder.is_run(model) else str(model)
    found = {name[: -len(".weight")]: value for name, value in pretrained_matrices(source).items()}
    for name, value in found.items():
        if not np.isfinite(value).all():
            raise UserError(f"{source}: {name}.weight has values that are not finite")
    if not found:
        raise UserError(f"{source}: no weight matrix of an ERNIE in it")
    return ordered(found)


def statistics(
    weights: Mapping[str, np.ndarray],
    bits: Sequence[int] = BITS,
    peaks: Mapping[str, float] | None = None,
    what: str = "weights",
) -> list[WeightStatistics]:
    """Of each matrix, at each of `bits`. `peaks`: {layer: bound of its histogram}, default: its largest weight."""
    found = []
    for name, weight in tqdm(weights.items(), desc=what, unit="matrix", disable=None, leave=False):
        found.append(_of(name, weight, bits, (peaks or {}).get(name, float(np.abs(weight).max()))))
    return found


def ordered(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Embeddings, encoder layers by number, pooler, classifier: files may hold another order."""
    places = ("embeddings", "encoder", "pooler")

    def place(name: str) -> tuple[int, int]:
        group = next((index for index, part in enumerate(places) if f"{part}." in name), len(places))
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        return group, numbers[0] if numbers else 0

    return {name: weights[name] for name in sorted(weights, key=place)}


def range_of(weight: np.ndarray, name: str, way: Way, bits: int) -> np.ndarray:
    """float32, to divide [in, out] by: [1], [out], or [in, 1] for an embedding's rows, whose lookups take one each."""
    granularity, range_ = way
    by_row = granularity == "channel" and "embeddings" in name
    weight = weight.T if by_row else weight
    absmax = range_ == "absmax"
    found = numeric.absmax_range(weight, granularity) if absmax else numeric.mse_range(weight, bits, granularity)
    return found[:, None] if by_row else found


def on_grid(weight: np.ndarray, found: np.ndarray, bits: int) -> np.ndarray:
    """The weight on the grid of `bits` whose range is `found`."""
    largest = numeric.qmax(bits)
    return numeric.on_grid(weight, found / np.float32(largest), largest)


def _of(name: str, weight: np.ndarray, widths: Sequence[int], peak: float) -> WeightStatistics:
    peak = peak if peak > 0 else 1.0
    mse_range: dict[int, float] = {}
    sqnr: dict[Way, dict[int, float]] = {}
    for way in WAYS:
        sqnr[way] = {}
        for bits in widths:
            found = range_of(weight, name, way, bits)
            sqnr[way][bits] = numeric.sqnr_db(weight, on_grid(weight, found, bits))
            if way == ("tensor", "mse"):
                mse_range[bits] = float(found[0])
    return WeightStatistics(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        kurtosis=kurtosis(weight),
        std=float(weight.std(dtype=np.float64)),
        absmax=float(np.abs(weight).max()),
        mse_range=mse_range,
        sqnr=sqnr,
        histogram=np.histogram(weight, bins=BINS, range=(-peak, peak))[0],
        histogram_peak=peak,
    )
