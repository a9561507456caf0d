"""Conformance of denoisers: a network's answers are one thing in five forms, sample by sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation import Condition, Denoiser, Generated, Level, Noise, NoisePath, Prediction
from lightrail.generation.prediction import FORMS
from lightrail.testing.building import built, check_is_documented, refuses_unknown_options
from lightrail.testing.suite import Check, NotApplicable, Suite, known_exceptions, name_of, require

__all__ = ["DenoiserSuite"]

Options = Mapping[str, Any]
SHARES = (0.9, 0.5, 0.1)  # of the way from the data to the noise
SAMPLES = 4


def _times(denoiser: Denoiser) -> list[float]:
    path = denoiser.path
    high = min(path.t_max, path.t_finite)
    return [path.t_min + share * (high - path.t_min) for share in SHARES]


def _states(denoiser: Denoiser, level: Level) -> Tensor:
    noise = Noise(0, range(SAMPLES), denoiser.shape, denoiser.dtype, denoiser.device)
    return (level.alpha * 0.3 + level.sigma * noise.normal(0)).to(denoiser.dtype)


def _condition(denoiser: Denoiser, count: int = SAMPLES) -> Condition | None:
    return denoiser.condition({"label": None}, range(count))


def _rows(condition: Condition | None, rows: list[int]) -> Condition | None:
    if condition is None:
        return None
    return {name: value[rows] if isinstance(value, Tensor) else value for name, value in condition.items()}


def _tolerance(denoiser: Denoiser) -> float:
    return {torch.float64: 1e-9, torch.float32: 1e-4}.get(denoiser.dtype, 0.05)


def _require_near(found: Tensor, expected: Tensor, denoiser: Denoiser, message: str) -> None:
    difference = float((found.double() - expected.double()).abs().max())
    scale = max(1.0, float(expected.double().abs().max()))
    require(difference <= _tolerance(denoiser) * scale, f"{message}: they differ by {difference:.3g}")


def check_builds_from_options(plugin: Any, options: Options) -> None:
    """``plugin(**options)`` is a lightrail.Denoiser that says its path, its form and the shape of a state."""
    denoiser = built(plugin, options)
    require(isinstance(denoiser, Denoiser), f"it is no lightrail.Denoiser but {type(denoiser).__name__}")
    require(isinstance(denoiser.path, NoisePath), f"its path is no NoisePath but {type(denoiser.path).__name__}")
    require(denoiser.form in FORMS, f"its form is {denoiser.form!r}, none of {', '.join(FORMS)}")
    sized = bool(denoiser.shape) and all(type(size) is int and size > 0 for size in denoiser.shape)
    require(sized, f"its shape is {denoiser.shape!r}, no tuple of sizes")
    known = set(denoiser.gives) <= set(FORMS) and denoiser.form in denoiser.gives
    require(known, f"it gives {denoiser.gives}, and its own form is {denoiser.form}")


def check_rejects_unknown_options(plugin: Any, options: Options) -> None:
    """An option that the signature lacks is an error."""
    built(plugin, options)
    refuses_unknown_options(plugin, options)


@torch.no_grad()
def check_gives_one_thing_in_all_forms(plugin: Any, options: Options) -> None:
    """x = α D + σ ε, v = α ε − σ D, u = (dα/dt) D + (dσ/dt) ε and score = −ε/σ, in the type of the state."""
    denoiser = built(plugin, options)
    for t in _times(denoiser):
        level = denoiser.path.level(t)
        x = _states(denoiser, level)
        found = denoiser.predict(x, level, _condition(denoiser))
        forms = {form: found.get(form) for form in denoiser.gives}
        for form, value in forms.items():
            require(
                value.shape == x.shape, f"the {form} prediction has shape {tuple(value.shape)}, not {tuple(x.shape)}"
            )
            require(value.dtype == x.dtype, f"the {form} prediction is {value.dtype}, the state {x.dtype}")
            require(bool(value.isfinite().all()), f"at t = {t:.4g} the {form} prediction is not finite")
        _require_consistent(denoiser, level, x, forms)


def _require_consistent(denoiser: Denoiser, level: Level, x: Tensor, forms: dict[str, Tensor]) -> None:
    if not {"data", "noise"} <= set(forms):
        return
    data, noise = forms["data"].double(), forms["noise"].double()
    expected = {
        "velocity": level.alpha * noise - level.sigma * data,
        "flow": level.alpha_rate * data + level.sigma_rate * noise,
        "score": -noise / level.sigma,
    }
    _require_near(level.alpha * data + level.sigma * noise, x, denoiser, "α D + σ ε is not the state")
    for form in set(expected) & set(forms):
        _require_near(forms[form], expected[form], denoiser, f"the {form} is not that of its data and noise")


@torch.no_grad()
def check_takes_a_time_for_each_sample(plugin: Any, options: Options) -> None:
    """Samples at times of their own get what they get when all are at that time."""
    denoiser = built(plugin, options)
    times = torch.tensor([*_times(denoiser), _times(denoiser)[0]], dtype=torch.float64)
    level = denoiser.path.levels(times.to(denoiser.device), 1 + len(denoiser.shape))
    x, condition = _states(denoiser, denoiser.path.level(float(times[1]))), _condition(denoiser)
    together = denoiser.predict(x, level, condition).get(denoiser.form)
    for row, t in enumerate(times.tolist()):
        alone = denoiser.predict(x, denoiser.path.level(t), condition).get(denoiser.form)
        _require_near(
            together[row], alone[row], denoiser, f"sample {row} at its own time t = {t:.4g} is not what all are"
        )


@torch.no_grad()
def check_treats_samples_apart(plugin: Any, options: Options) -> None:
    """A sample gets the same answer alone, in any batch, and again."""
    denoiser = built(plugin, options)
    level, condition = denoiser.path.level(_times(denoiser)[1]), _condition(denoiser)
    x = _states(denoiser, level)
    together = denoiser.predict(x, level, condition).get(denoiser.form)
    again = denoiser.predict(x, level, condition).get(denoiser.form)
    require(torch.equal(together, again), "asked again, it answers otherwise")
    for row in range(SAMPLES):
        alone = denoiser.predict(x[[row]], level, _rows(condition, [row])).get(denoiser.form)
        _require_near(alone, together[[row]], denoiser, "a sample alone gets another answer than beside others")


@torch.no_grad()
def check_keeps_its_hands_off(plugin: Any, options: Options) -> None:
    """The state stays as it is, and torch's random numbers are left alone."""
    denoiser = built(plugin, options)
    level = denoiser.path.level(_times(denoiser)[1])
    x = _states(denoiser, level)
    before, random_state = x.clone(), torch.get_rng_state()
    denoiser.predict(x, level, _condition(denoiser))
    require(torch.equal(x, before), "it changes the state in place")
    require(torch.equal(torch.get_rng_state(), random_state), "it draws from torch's global generator")


@torch.no_grad()
def check_knows_its_classes(plugin: Any, options: Options) -> None:
    """Labels are given out one a sample and in turn; one that it does not know is a CompositionError."""
    denoiser = built(plugin, options)
    try:
        denoiser.condition({"label": denoiser.classes}, range(2))
    except CompositionError:
        pass
    else:
        require(False, f"it takes label {denoiser.classes}, and its classes are {denoiser.classes}")
    if not denoiser.classes:
        return
    wanted = [0, denoiser.classes - 1]
    condition = denoiser.condition({"label": wanted}, range(5))
    require(condition is not None and "label" in condition, "asked for labels, it gives no condition 'label'")
    assert condition is not None
    require(
        condition["label"].tolist() == (wanted * 3)[:5], f"labels {wanted} in turn are {condition['label'].tolist()}"
    )
    level = denoiser.path.level(_times(denoiser)[1])
    x = _states(denoiser, level)[:1].repeat(2, *[1] * len(denoiser.shape))
    first, last = denoiser.predict(x, level, _rows(condition, [0, 1])).get(denoiser.form)
    require(denoiser.classes == 1 or not torch.equal(first, last), "two labels get one answer")
    plain = denoiser.predict(x, level, denoiser.unconditional(_rows(condition, [0, 1]))).get(denoiser.form)
    require(plain.shape == x.shape and bool(plain.isfinite().all()), "without a condition it gives no finite answer")
    _require_near(plain[0], plain[1], denoiser, "without a condition equal samples get different answers")


@torch.no_grad()
def check_is_told_a_time(plugin: Any, options: Options) -> None:
    """``network_time`` reaches the network, the level's α and σ stay: one number for all, or one a sample."""
    denoiser = built(plugin, options)
    high, middle, _ = _times(denoiser)
    level = denoiser.path.level(middle)
    x, condition = _states(denoiser, level), _condition(denoiser)
    told = denoiser.predict(x, level, condition, network_time=high)
    each = denoiser.predict(x, level, condition, network_time=torch.full((SAMPLES,), high, dtype=torch.float64))
    _require_near(told.get(denoiser.form), each.get(denoiser.form), denoiser, "one time for all is not one a sample")
    expected = denoiser.output(x, torch.full((SAMPLES,), high, dtype=torch.float64, device=x.device), condition)
    _require_near(told.get(denoiser.form), expected, denoiser, "the network is not told network_time")
    require(isinstance(told, Prediction) and told.level is level, "the prediction is not at the level that was given")


def check_starts_as_its_path(plugin: Any, options: Options) -> None:
    """It starts from noise of the path's scale, in its own type and shape, the same for the same sample."""
    denoiser = built(plugin, options)
    level = denoiser.path.level(min(denoiser.path.t_max, denoiser.path.t_finite))
    some, other = (
        denoiser.start(Noise(1, indices, denoiser.shape, denoiser.dtype, denoiser.device), level)
        for indices in (range(64), [5, 3])
    )
    require(tuple(some.shape) == (64, *denoiser.shape), f"it starts from {tuple(some.shape)}")
    require(some.dtype == denoiser.dtype, f"it starts in {some.dtype}, and its type is {denoiser.dtype}")
    require(torch.equal(other, some[[5, 3]]), "a sample's start depends on its batch")
    scale = float(some.double().square().mean().sqrt()) / denoiser.path.starting_scale(level)
    require(0.6 < scale < 1.6, f"its start is {scale:.2g} times as large as the path says")


@torch.no_grad()
def check_encodes_what_it_decodes(plugin: Any, options: Options) -> None:
    """``encode`` undoes ``decode``, where it keeps the shape of a state; a decoder that does not returns to it."""
    denoiser = built(plugin, options)
    generator = torch.Generator().manual_seed(0)
    x = (1.8 * torch.rand((2, *denoiser.shape), generator=generator) - 0.9).to(denoiser.device, denoiser.dtype)
    decoded = denoiser.decode(x)
    require(len(decoded) == 2, f"two states are decoded to {len(decoded)} samples")
    back = denoiser.encode(decoded)
    require(back.shape == x.shape, f"decoded and encoded, states {tuple(x.shape)} are {tuple(back.shape)}")
    if decoded.shape == x.shape:
        _require_near(back, x, denoiser, "decoded and encoded, states are not what they were")


def check_has_a_fingerprint(plugin: Any, options: Options) -> None:
    """A word that is the same again and for the same model built anew, and that using the model does not change."""
    denoiser = built(plugin, options)
    try:
        found = denoiser.fingerprint()
    except CompositionError as error:
        raise NotApplicable(error.what) from error
    require(isinstance(found, str) and found, f"fingerprint() is {found!r}, no word")
    level = denoiser.path.level(_times(denoiser)[1])
    with torch.no_grad():
        denoiser.predict(_states(denoiser, level), level, _condition(denoiser))
    require(denoiser.fingerprint() == found, "its fingerprint changes when it is used")
    require(built(plugin, options).fingerprint() == found, "the same model built anew has another fingerprint")


def check_knows_its_moments(plugin: Any, options: Options) -> None:
    """Mean and covariance of its data are float64 and of a state's size; without, it raises a CompositionError."""
    denoiser = built(plugin, options)
    try:
        mean, covariance = denoiser.moments()
    except CompositionError as error:
        raise NotApplicable(error.what) from error
    size = int(torch.Size(denoiser.shape).numel())
    shapes = tuple(mean.shape) == (size,) and tuple(covariance.shape) == (size, size)
    require(shapes, f"moments are {tuple(mean.shape)} and {tuple(covariance.shape)}; a state has {size} numbers")
    require(mean.dtype == covariance.dtype == torch.float64, f"moments are {mean.dtype} and {covariance.dtype}")
    values = torch.linalg.eigvalsh(covariance)
    sound = torch.allclose(covariance, covariance.T) and float(values[0]) >= -1e-9 * max(1.0, float(values[-1]))
    require(sound, "the covariance is not symmetric with eigenvalues of at least 0")


def check_measures_numbers(plugin: Any, options: Options) -> None:
    """What it says of a generation is numbers by name."""
    denoiser = built(plugin, options)
    level = denoiser.path.level(min(denoiser.path.t_max, denoiser.path.t_finite))
    start = denoiser.start(Noise(0, range(8), denoiser.shape, denoiser.dtype, denoiser.device), level)
    with torch.no_grad():
        samples = denoiser.decode(start * 0.1)
    found = denoiser.measure(Generated(samples.cpu(), start.cpu()))
    for name, value in found.items():
        require(isinstance(name, str) and isinstance(value, int | float), f"measure() holds {name!r}: {value!r}")


CHECKS: tuple[Check, ...] = (
    check_is_documented,
    check_builds_from_options,
    check_rejects_unknown_options,
    check_gives_one_thing_in_all_forms,
    check_takes_a_time_for_each_sample,
    check_treats_samples_apart,
    check_keeps_its_hands_off,
    check_knows_its_classes,
    check_is_told_a_time,
    check_starts_as_its_path,
    check_encodes_what_it_decodes,
    check_has_a_fingerprint,
    check_knows_its_moments,
    check_measures_numbers,
)


class DenoiserSuite(Suite):
    """Every check of a denoiser."""

    kind: ClassVar[str] = "denoiser"
    checks: ClassVar[tuple[Check, ...]] = (*CHECKS, known_exceptions(frozenset(map(name_of, CHECKS))))
