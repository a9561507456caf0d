"""Feynman–Kac correctors: weighted particles that reach annealed, guided, joint and tilted distributions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import Denoiser, Generated, Guidance, Moment, Prediction, Sampler, SamplerWrapper, State
from lightrail.generation.guidance import Run
from lightrail.options import at_least, between, non_negative, one_of, positive
from lightrail.traits import Traits
from lightrail_generation.guidance.feynman_kac_claims import CLAIMS
from lightrail_generation.guidance.judges import LoadRun, Reward, denoiser_of_run
from lightrail_generation.guidance.path_weights import annealing_rate, cfg_rate, lambda_step, product_rate
from lightrail_generation.guidance.resampling import effective_sample_size, systematic_resampling

__all__ = ["FeynmanKac"]

TARGETS = ("annealing", "cfg", "product", "reward")
# Final samples of more dimensions have too many moments to be read.
MOST_DIMENSIONS = 4


class FeynmanKac(Guidance):
    """Draws particles with a mixed score and weighs them by what the mixed score gets wrong.

    A score that is mixed of others is not that of the noised target; a sampler that follows it arrives elsewhere. The
    samples of a population carry weights that make up for it, with ε = −σ s of each prediction and λ = log(α/σ):

    =========  ======================  ========================  =================================
    target     distribution            predicted noise           log weight
    =========  ======================  ========================  =================================
    annealing  q^β                     β ε                       d log w = β (β − 1) |ε|² dλ
    cfg        q_u^{1−β} q_c^β         ε_u + β (ε_c − ε_u)       d log w = β (β − 1) |ε_u − ε_c|² dλ
    product    q_1 q_2                 ε_1 + ε_2                 d log w = 2 ⟨ε_1, ε_2⟩ dλ
    reward     q exp(β r)              ε                         Δ log w = β (r(D_t) − r(D_s))
    =========  ======================  ========================  =================================

    Where the weights of a population have grown uneven, its particles are drawn again in proportion to them, and once
    more at the end: the samples then count alike. They share a population, so they are not independent, and some are
    copies of one another. Weights are right as steps get finer: ``ddpm`` with ``variance=large`` needs the fewest.

    Args:
        target: ``annealing``, ``cfg``, ``product`` or ``reward``.
        beta: β. For ``annealing`` above 0; below 1 is hotter than the model. For ``cfg`` at least 0, the scale of the
            convention uncond + β (cond − uncond). For ``reward`` any number, the inverse temperature. 1 is the model
            itself for ``annealing`` and ``cfg``, 0 for ``reward``; ``product`` has no use for it.
        particles: K, samples of a population, at least 2; some hundreds where β is far from 1 or states are large.
        threshold: In [0, 1]: a population is drawn again where its effective sample size falls below threshold · K.
        resample: ``adaptive``, as above, or ``never``: the mixed score alone, without weights.
        run: For ``product``, the run of the other model: a folder, a checkpoint, or ``latest``; or
        other: the other denoiser itself, on the same noise path.
        function: For ``reward``, r: a callable from samples ``[B, …]`` in the user's units to ``[B]``, or its dotted
            path. No gradient is needed.
        load_run: Loads a run.

    Raises:
        ConfigurationError: An option is out of range, or what the target needs is missing.
        CompositionError: The sampler draws no fresh noise, or is wrapped; the other model has another shape or path;
            ``cfg`` has no condition.

    Deviations:
        The released code for images centres and clamps the weights and resamples at each step, which gives up the
        target; here the weights are as derived. Steps have Δλ = (1 − e^{−2h})/2, as the drift of an Euler step in σ²/α²
        has, so that the last one is finite. Noise beyond the paper's (``si_sde`` with a large epsilon) leaves the
        weights as they are, as that part of the dynamics keeps the target; it also makes up for the start, which is
        normal noise of variance σ²/β (σ²/2 for ``product``) around 0, and not around the target's own mean. Potentials
        of ``reward`` are those of Feynman–Kac steering, without the gradient of r in the drift.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail_generation.samplers.ddpm import DDPM
        >>> from lightrail_generation.time_grids.uniform_lambda import UniformLambda
        >>> mixture, sampler = GaussianMixture(), DDPM(steps=20)
        >>> grid = sampler.grid(mixture.path, UniformLambda())
        >>> colder = FeynmanKac(target="annealing", beta=1.5, particles=8)
        >>> tuple(sample(mixture, sampler, grid, range(16), guidance=[colder]).x.shape)
        (16, 2)

    Reference:
        M. Skreta, T. Akhound-Sadegh, V. Ohanesian, R. Bondesan, A. Aspuru-Guzik, A. Doucet, R. Brekelmans, A. Tong and
        K. Neklyudov (2025), Feynman-Kac Correctors in Diffusion: Annealing, Guidance, and Product of Experts, arXiv
        2503.02819.
    """

    traits: ClassVar[Traits] = Traits(
        rule="d log w = β (β − 1) |ε_u − ε_c|² dλ along the reverse diffusion with ε_u + β (ε_c − ε_u)",
        paper="M. Skreta, T. Akhound-Sadegh, V. Ohanesian, R. Bondesan, A. Aspuru-Guzik, A. Doucet, R. Brekelmans, "
        "A. Tong, K. Neklyudov, 2025, Feynman-Kac Correctors in Diffusion: Annealing, Guidance, and Product of "
        "Experts, arXiv 2503.02819",
        is_stochastic=True,
        example={"target": "annealing", "beta": 1.2, "particles": 4},
        sampling_claims=CLAIMS,
    )

    def __init__(
        self,
        target: str = "cfg",
        beta: float = 2.0,
        particles: int = 64,
        threshold: float = 0.5,
        resample: str = "adaptive",
        run: str | None = None,
        other: Denoiser | None = None,
        function: str | Callable[[Tensor], Tensor] | None = None,
        load_run: LoadRun | None = None,
    ) -> None:
        one_of(TARGETS, target=target)
        one_of(("adaptive", "never"), resample=resample)
        at_least(2, particles=particles)
        between(0, 1, closed="both", threshold=threshold)
        if target == "annealing":
            positive(beta=beta)
        elif target == "cfg":
            non_negative(beta=beta)
        between(-math.inf, math.inf, closed="neither", beta=beta)
        _check_needs(target, run, other, function)
        self.target = target
        self.beta = beta
        self.population = particles
        self.threshold = threshold
        self.resample = resample
        self.other = denoiser_of_run(run, load_run) if run is not None else other
        self.reward = None if function is None else Reward(function)
        self.asks = {"cfg": ("uncond",), "product": ("other",)}.get(target, ())

    def prepare(self, denoiser: Denoiser, sampler: Sampler) -> None:
        is_wrapped = isinstance(sampler, SamplerWrapper) and self.target != "reward"
        if is_wrapped or not sampler.card.solves_reverse_diffusion:
            raise CompositionError(
                f"feynman_kac cannot weigh the samples of {type(sampler).__name__}",
                found=f"{type(sampler).__name__} under its options",
                allowed="solvers of the reverse diffusion with fresh noise, without a wrapper: ddpm, ddim with eta=1, "
                "dpm_solver_pp with stochastic=true, si_sde with epsilon above 0",
                remedy="Choose +sampler=ddpm and leave sampler_wrapper out.",
            )
        if self.target == "product" and self.other is not None:
            self.other.to(denoiser.device)
            _check_pair(denoiser, self.other)

    def evaluate(self, name: str, moment: Moment) -> Prediction:
        assert self.other is not None
        knows_it = self.other.classes == moment.denoiser.classes
        return self.other.predict(moment.x, moment.level, moment.condition if knows_it else None, moment.network_time)

    def mix(self, named: Mapping[str, Prediction], moment: Moment) -> Prediction:
        cond = named["cond"]
        x, level, beta = cond.x, cond.level, self.beta
        if self.target == "annealing":
            self._note(moment, annealing_rate(cond.noise, beta))
            return Prediction(x, level, "noise", beta * cond.noise)
        if self.target == "cfg":
            uncond = named["uncond"]
            self._note(moment, cfg_rate(uncond.noise, cond.noise, beta))
            return Prediction(x, level, "data", uncond.data + beta * (cond.data - uncond.data))
        if self.target == "product":
            other = named["other"]
            self._note(moment, product_rate(cond.noise, other.noise))
            return Prediction(x, level, "noise", cond.noise + other.noise)
        return cond

    @staticmethod
    def _note(moment: Moment, rate: Tensor) -> None:
        # The first evaluation of a step stands at the state that the step starts from.
        moment.memory.setdefault("rate", rate.detach())

    def after_step(self, state: State, moment: Moment) -> State:
        memory = moment.memory
        rate = memory.pop("rate", None)
        if self.resample == "never":
            return state
        if self.target == "reward":
            assert moment.prediction is not None
            self._tilt(moment.denoiser.decode(moment.prediction.data), memory)
        elif rate is not None:
            self._weigh(lambda_step(moment.level, moment.grid[state.index]) * rate, memory)
        log_weights = memory["log_weights"].view(-1, self.population)
        shares = effective_sample_size(log_weights) / self.population
        memory["ess"] = shares.repeat_interleave(self.population)
        memory["smallest_ess"] = torch.minimum(memory["ess"], memory.get("smallest_ess", memory["ess"]))
        # The last draw is made when all is done.
        is_last = state.index >= moment.grid.steps
        return state if is_last else self._drawn_again(state, moment, shares < self.threshold, 0)

    def _tilt(self, samples: Tensor, memory: dict[str, Any]) -> None:
        assert self.reward is not None
        rewards = self.reward.needs_no_gradient(samples).double()
        self._weigh(self.beta * (rewards - memory.get("reward", 0.0)), memory)
        memory["reward"] = rewards

    @staticmethod
    def _weigh(by: Tensor, memory: dict[str, Any]) -> None:
        if not bool(by.isfinite().all()):
            raise CompositionError(
                "the weights of the particles are not finite",
                found=f"{int((~by.isfinite()).sum())} of {len(by)} particles",
                allowed="finite numbers",
                remedy="Take more sampler.steps, or a beta nearer to 1.",
            )
        memory["log_weights"] = memory.get("log_weights", 0.0) + by

    def _drawn_again(self, state: State, moment: Moment, is_uneven: Tensor, draw: int) -> State:
        """Where a population is uneven, its particles in proportion to their weights, which then are equal."""
        if not bool(is_uneven.any()):
            return state
        count = self.population
        log_weights = moment.memory["log_weights"].view(-1, count)
        kept = torch.arange(count, device=log_weights.device).expand_as(log_weights)
        uniform = moment.uniform(draw).view(-1, count)[:, 0]
        chosen = torch.where(is_uneven[:, None], systematic_resampling(log_weights, uniform), kept)
        firsts = count * torch.arange(len(log_weights), device=log_weights.device)
        state = moment.resample(state, (chosen + firsts[:, None]).flatten())
        moment.memory["log_weights"] = log_weights.masked_fill(is_uneven[:, None], 0.0).flatten()
        return state

    def around(self, run: Run, start: Tensor, moment: Moment) -> State:
        self._check_start(moment)
        power = {"annealing": self.beta, "product": 2.0}.get(self.target, 1.0)
        state = run(start / math.sqrt(power))
        if self.resample == "never":
            return state
        if self.target == "reward":
            self._tilt(moment.denoiser.decode(state.x), moment.memory)
        log_weights = moment.memory["log_weights"].view(-1, self.population)
        return self._drawn_again(state, moment, log_weights.amax(1) > log_weights.amin(1), 1)

    def _check_start(self, moment: Moment) -> None:
        if self.target == "cfg" and moment.condition is None:
            raise CompositionError(
                "feynman_kac with target=cfg has no condition to guide to",
                found="samples without a label or a prompt",
                allowed="a conditional model with a condition",
                remedy="Set generate.label or generate.prompt, or another guidance.feynman_kac.target.",
            )
        ours, theirs = moment.denoiser.classes, 0 if self.other is None else self.other.classes
        if moment.condition is not None and theirs not in (0, ours):
            raise CompositionError(
                "the two models of a product do not know the same classes",
                found=f"{theirs} classes, and {ours} of the model that is guided",
                allowed="as many classes, or none",
                remedy="Leave generate.label out, or choose another run.",
            )
        if self.target in ("annealing", "product") and moment.grid[0].alpha == 0:
            raise CompositionError(
                f"feynman_kac with target={self.target} cannot start where no data are left in the state",
                found=f"the first time t={moment.grid[0].t:.6g}, with α = 0",
                allowed="a first level with α above 0",
                remedy="Set time_grid.start a little below that.",
            )

    def measure(self, generated: Generated) -> dict[str, float]:
        """Mean and variance of each of few dimensions; the mean reward; the share of samples that are no copies."""
        samples = generated.samples.double()
        flat = samples.flatten(1)
        found = {"distinct": len(flat.unique(dim=0)) / len(flat)}
        if self.reward is not None:
            found["reward"] = float(self.reward.needs_no_gradient(generated.samples).double().mean())
        if flat.shape[1] <= MOST_DIMENSIONS:
            for number, (mean, variance) in enumerate(zip(flat.mean(0), flat.var(0, correction=0), strict=True)):
                suffix = "" if flat.shape[1] == 1 else f"_{number}"
                found[f"mean{suffix}"], found[f"variance{suffix}"] = float(mean), float(variance)
        return found


def _check_needs(target: str, run: str | None, other: Denoiser | None, function: Any) -> None:
    given = [name for name, value in (("run", run), ("other", other), ("function", function)) if value is not None]
    allowed = {"product": (["run"], ["other"]), "reward": (["function"],)}.get(target, ([],))
    if given not in allowed:
        wanted = " or ".join(name for names in allowed for name in names) or "none of run, other and function"
        raise ConfigurationError(
            f"feynman_kac with target={target} needs {wanted}",
            found=" and ".join(given) or "none of them",
            allowed=wanted,
            remedy="Set guidance.feynman_kac.run=FOLDER for a product, guidance.feynman_kac.function for a reward.",
        )


def _check_pair(denoiser: Denoiser, other: Denoiser) -> None:
    first, second = denoiser.path, other.path
    times = [first.t_min + share * (first.t_finite - first.t_min) for share in (0.0, 0.3, 0.6, 1.0)]
    pairs = [(first.level(t), second.level(t)) for t in times]
    is_same = all(math.isclose(a.alpha, b.alpha, rel_tol=1e-3, abs_tol=1e-6) for a, b in pairs) and all(
        math.isclose(a.sigma, b.sigma, rel_tol=1e-3, abs_tol=1e-6) for a, b in pairs
    )
    if denoiser.shape != other.shape or not is_same:
        raise CompositionError(
            "the two models of a product do not fit together",
            found=f"states {other.shape} on {type(second).__name__}, and {denoiser.shape} on {type(first).__name__}",
            allowed="the same shape and the same noise path",
            remedy="Choose a run that was trained like this one, on other data or other classes.",
        )
