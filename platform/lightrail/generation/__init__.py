"""Generation: noise paths, denoisers, time grids and the contract of samplers."""

from lightrail.generation.conjugate_gradients import conjugate_gradients
from lightrail.generation.denoiser import Condition, Denoiser, Generated
from lightrail.generation.evaluator import Evaluator
from lightrail.generation.gaussian_mixture import GaussianMixture
from lightrail.generation.guidance import Guidance, Moment
from lightrail.generation.measurement import Measurement, Observed, StateMeasurement
from lightrail.generation.noise import Noise
from lightrail.generation.noise_path import KarrasVE, Level, LinearFlow, NoisePath
from lightrail.generation.prediction import Prediction
from lightrail.generation.sampler import Predict, Sampler, SamplerWrapper, State, weighted_sum
from lightrail.generation.sampling import Sampled, check_fit, invert, sample
from lightrail.generation.time_grid import Grid, TimeGrid
from lightrail.generation.variance_preserving import CosineVP, LinearVP, TableVP, VariancePreserving

__all__ = [
    "Condition",
    "CosineVP",
    "Denoiser",
    "Evaluator",
    "GaussianMixture",
    "Generated",
    "Grid",
    "Guidance",
    "KarrasVE",
    "Level",
    "LinearFlow",
    "LinearVP",
    "Measurement",
    "Moment",
    "Noise",
    "NoisePath",
    "Observed",
    "Predict",
    "Prediction",
    "Sampled",
    "Sampler",
    "SamplerWrapper",
    "State",
    "StateMeasurement",
    "TableVP",
    "TimeGrid",
    "VariancePreserving",
    "check_fit",
    "conjugate_gradients",
    "invert",
    "sample",
    "weighted_sum",
]
