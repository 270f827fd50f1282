"""Calibration of a classifier: the temperature T by which logits are divided, so that of the answers with a confidence
of 80 % about 80 % are right (Guo et al., On Calibration of Modern Neural Networks, 2017). Pure functions.

Logits have the shape (M, K): a row for each view (frame) of N files, all of the first file, then of the next; counts,
(N,), says how many each file has. The probabilities of its views are averaged, as the service does. Labels are (N,)
class_ids.
"""
import math
from typing import NamedTuple

import numpy as np

from app.config import StartError
from app.engine.calibration import HIGHEST, LOWEST

BINS = 15              # of the expected calibration error, as in the paper
FOLDS = 5              # each file is judged with a temperature that was fitted on the other four fifths
FEWEST = 50            # files: below, a fold has fewer than ten
TOLERANCE = 1e-5       # of log T
NEGLIGIBLE = 0.01      # a fall of the NLL by less than this part of it does not make up for an ECE that rises
AT_ONCE = 2**22        # logits that are worked on at once: 32 MB as float64
GOLDEN = (math.sqrt(5) - 1) / 2


class CalibrationError(StartError):
    """Labelled files that no temperature can be fitted on; the message is one line."""


class Bin(NamedTuple):
    """The files whose confidence is in one interval: how many, their mean confidence, the share that is right."""
    count: int
    confidence: float
    accuracy: float


class Judged(NamedTuple):
    """confidence: (N,) of the best class, 0..1; right: (N,) bool; losses: (N,) negative log-likelihood in nats."""
    confidence: np.ndarray
    right: np.ndarray
    losses: np.ndarray

    @property
    def nll(self):
        return float(self.losses.mean())

    @property
    def bins(self):
        return bins(self.confidence, self.right)

    @property
    def ece(self):
        return expected_error(self.bins)


class Fit(NamedTuple):
    """temperature: fitted on all files; by_fold: those that were fitted without each fold; before, after: Judged with
    T = 1, and with the temperature of the fold in which a file was left out."""
    temperature: float
    by_fold: list
    before: Judged
    after: Judged

    @property
    def helps(self):
        """Whether the NLL of files that it was not fitted on falls; by more than a little, if their ECE rises."""
        least = NEGLIGIBLE * self.before.nll if self.ece_rises else 0
        return self.before.nll - self.after.nll > least

    @property
    def ece_rises(self):
        return self.after.ece > self.before.ece


def bins(confidence, right):
    """[Bin] of BINS intervals of equal width: (0, 1/15], (1/15, 2/15], … Empty ones have NaN."""
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    found = []
    for i in range(BINS):
        inside = place == i
        found.append(Bin(int(inside.sum()), float(confidence[inside].mean()), float(right[inside].mean()))
                     if inside.any() else Bin(0, math.nan, math.nan))
    return found


def expected_error(bins):
    """The expected calibration error: how far confidence and accuracy are apart, on average over files."""
    total = sum(one.count for one in bins)
    return sum(one.count / total * abs(one.confidence - one.accuracy) for one in bins if one.count)


def judged(logits, counts, labels, temperatures):
    """Judged for logits divided by temperatures: one, or (N,)."""
    temperatures = np.broadcast_to(np.asarray(temperatures, np.float64), len(counts))
    confidence, right, losses = np.empty(len(counts)), np.empty(len(counts), bool), np.empty(len(counts))
    ends = np.cumsum(counts)
    step = max(1, AT_ONCE // (int(max(counts)) * logits.shape[1]))
    for start in range(0, len(counts), step):
        part = slice(start, start + step)
        logs = log_probabilities(logits[ends[start] - counts[start]:ends[part][-1]], counts[part], temperatures[part])
        confidence[part] = np.exp(logs.max(axis=1))
        right[part] = logs.argmax(axis=1) == labels[part]
        losses[part] = -logs[np.arange(len(logs)), labels[part]]
    return Judged(np.minimum(confidence, 1), right, losses)


def log_probabilities(logits, counts, temperatures):
    """(M, K), (N,), (N,) → (N, K) float64: the logarithm of the probabilities, averaged over the views of each file."""
    scaled = logits / np.repeat(temperatures, counts)[:, None]
    scaled -= scaled.max(axis=1, keepdims=True)
    scaled -= np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    if len(scaled) == len(counts):
        return scaled
    return np.logaddexp.reduceat(scaled, np.cumsum(counts) - counts, axis=0) - np.log(counts)[:, None]


class Losses:
    """The losses of all files at each temperature that was asked for: the searches on different folds share most of
    their steps."""

    def __init__(self, logits, counts, labels):
        self.logits, self.counts, self.labels, self.known = logits, counts, labels, {}

    def at(self, log_temperature):
        """(N,) negative log-likelihoods."""
        if log_temperature not in self.known:
            self.known[log_temperature] = judged(self.logits, self.counts, self.labels,
                                                 math.exp(log_temperature)).losses
        return self.known[log_temperature]

    def fit(self, chosen):
        """The T with the least mean loss of the chosen files, (N,) bool. Raises CalibrationError if it has none."""
        lowest, highest = math.log(LOWEST), math.log(HIGHEST)
        best = golden_section(lambda at: self.at(at)[chosen].mean(), lowest, highest)
        if min(best - lowest, highest - best) < 100 * TOLERANCE:
            raise CalibrationError(
                f"no temperature fits: the best one lies beyond {LOWEST if best < 0 else HIGHEST:g}, as the answers "
                f"are {'right' if best < 0 else 'wrong'} however sure they are; calibration needs labelled files of "
                f"which some are answered rightly and some wrongly")
        return math.exp(best)


def golden_section(function, low, high):
    """Where a function with one minimum between low and high has it."""
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > TOLERANCE:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = function(right)
    return (low + high) / 2


def check_number(count):
    if count < FEWEST:
        raise CalibrationError(f"too few labelled files to calibrate with: {count}; at least {FEWEST} are needed, "
                               f"as each of {FOLDS} parts is judged by the others; some hundreds are better")


def fit(logits, counts, labels):
    """Fit a temperature, and judge it on files that it was not fitted on. Returns Fit; raises CalibrationError.

    logits: (M, K); counts, labels: (N,) integers.
    """
    check_number(len(labels))
    before = judged(logits, counts, labels, 1.0)
    right = int(before.right.sum())
    if right in (0, len(labels)):
        raise CalibrationError(f"all {len(labels)} answers are {'right' if right else 'wrong'}: no temperature fits "
                               "them; calibration needs labelled files of which some are answered rightly and some "
                               "wrongly")
    losses = Losses(logits, counts, labels)
    temperature = losses.fit(np.ones(len(labels), bool))
    fold = np.random.default_rng(0).permutation(len(labels)) % FOLDS
    by_fold = [losses.fit(fold != i) for i in range(FOLDS)]
    return Fit(temperature, by_fold, before, judged(logits, counts, labels,
                                                      np.array(by_fold)[fold]))
