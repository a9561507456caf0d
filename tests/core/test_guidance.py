"""The contract of guidance: what is asked, what is mixed, corrected, moved, resampled and repeated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation import (
    Denoiser,
    GaussianMixture,
    Guidance,
    LinearVP,
    Measurement,
    Moment,
    Observed,
    Prediction,
    Sampler,
    State,
    TimeGrid,
    sample,
)


class Uniform(TimeGrid):
    def times(self, path, start, stop, count):  # type: ignore[no-untyped-def]
        return torch.linspace(start, stop, count, dtype=torch.float64).numpy()


class Euler(Sampler):
    def step(self, state, predict, grid):  # type: ignore[no-untyped-def]
        here, there = grid[state.index], grid[state.index + 1]
        found = predict(state.x, here)
        return state.next(there.alpha * found.data + there.sigma * found.noise)


class Heun(Euler):
    """Two evaluations a step."""

    def step(self, state, predict, grid):  # type: ignore[no-untyped-def]
        there = grid[state.index + 1]
        euler = super().step(state, predict, grid)
        if there.is_clean:
            return euler
        return dataclasses.replace(euler, x=(euler.x + 0.0 * predict(euler.x, there).data))


class Labelled(Denoiser):
    """The mean of its class, with a call counter: one output for a joined batch."""

    path = LinearVP()
    form = "data"
    shape = (2,)
    dtype = torch.float64
    classes = 2

    def __init__(self) -> None:
        self.calls: list[int] = []

    def output(self, x: Tensor, t: Tensor, condition: Mapping[str, Tensor] | None) -> Tensor:
        self.calls.append(len(x))
        label = condition["label"] if condition is not None else torch.full((len(x),), 2)
        return torch.tanh(x) * 0.1 + label[:, None].double()

    def unconditional(self, condition):  # type: ignore[no-untyped-def]
        assert condition is not None
        return {"label": torch.full_like(condition["label"], 2)}


class Mix(Guidance):
    asks = ("uncond",)

    def __init__(self, w: float) -> None:
        self.w = w

    def mix(self, named: Mapping[str, Prediction], moment: Moment) -> Prediction:
        cond, uncond = named["cond"], named["uncond"]
        return Prediction(moment.x, moment.level, "data", uncond.data + self.w * (cond.data - uncond.data))


GRID_STEPS = 4
CONDITION = {"label": torch.tensor([0, 1, 1])}


def drawn(guidance, denoiser=None, sampler=Euler, condition=CONDITION, indices: Sequence[int] = range(3)):  # type: ignore[no-untyped-def]
    denoiser = denoiser or Labelled()
    solver = sampler(steps=GRID_STEPS)
    grid = solver.grid(denoiser.path, Uniform())
    return sample(denoiser, solver, grid, indices, seed=1, condition=condition, guidance=guidance)


def test_conditional_and_unconditional_are_asked_in_one_call_and_counted_as_two() -> None:
    denoiser = Labelled()
    found = drawn([Mix(2.0)], denoiser)
    assert denoiser.calls == [6] * GRID_STEPS
    assert found.evaluations == 2 * GRID_STEPS


def test_scale_one_is_the_conditional_and_scale_zero_the_unconditional_prediction() -> None:
    plain = drawn([])
    torch.testing.assert_close(drawn([Mix(1.0)]).x, plain.x, rtol=1e-13, atol=1e-13)
    nobody = {"label": torch.tensor([2, 2, 2])}
    torch.testing.assert_close(drawn([Mix(0.0)]).x, drawn([], condition=nobody).x, rtol=1e-13, atol=1e-13)


def test_a_chain_hands_on_what_it_made() -> None:
    twice = drawn([Mix(2.0), Mix(3.0)])
    # u + 3 (u + 2 (c − u) − u) = u + 6 (c − u)
    torch.testing.assert_close(twice.x, drawn([Mix(6.0)]).x, rtol=1e-12, atol=1e-12)
    assert twice.evaluations == 2 * GRID_STEPS


def test_guidance_that_is_not_active_costs_nothing() -> None:
    class Late(Mix):
        def is_active(self, moment: Moment) -> bool:
            return moment.level.t < 0.6

    found = drawn([Late(2.0)])
    assert found.evaluations == GRID_STEPS + sum(t < 0.6 for t in (1.0, 0.667, 0.334, 0.001))


def test_a_sample_does_not_depend_on_its_batch() -> None:
    together = drawn([Mix(2.0)])
    alone = drawn([Mix(2.0)], condition={"label": torch.tensor([1])}, indices=[1])
    torch.testing.assert_close(alone.x[0], together.x[1], rtol=1e-13, atol=1e-13)


def test_predictions_of_ones_own_are_evaluated_and_counted() -> None:
    class Weak(Guidance):
        asks = ("weak",)

        def evaluate(self, name: str, moment: Moment) -> Prediction:
            assert name == "weak"
            return moment.denoiser.predict(moment.x, moment.level, None)

        def mix(self, named: Mapping[str, Prediction], moment: Moment) -> Prediction:
            return named["weak"]

    found = drawn([Weak()])
    assert found.evaluations == 2 * GRID_STEPS
    torch.testing.assert_close(found.x, drawn([], condition=None).x, rtol=1e-13, atol=1e-13)


def test_the_data_are_corrected_before_the_sampler_sees_them() -> None:
    class Clamp(Guidance):
        def correct(self, prediction: Prediction, moment: Moment) -> Prediction:
            return prediction.with_data(prediction.data.clamp(max=0.3))

    assert float(drawn([Clamp()]).x.max()) <= 0.3 + 1e-12


def test_the_gradient_goes_through_the_network_at_the_start_of_the_step_and_the_sampler_sees_no_graph() -> None:
    denoiser = GaussianMixture()
    seen: list[tuple[Tensor, Tensor, Tensor, float]] = []

    class Probe(Guidance):
        needs_gradient = True

        def after_step(self, state: State, moment: Moment) -> State:
            losses, gradient = moment.gradient(lambda prediction: prediction.data.square().sum(-1))
            assert not state.x.requires_grad
            seen.append((moment.x, losses, gradient, moment.level.t))
            return state

    plain = drawn([], denoiser, Heun, None)
    guided = drawn([Probe()], denoiser, Heun, None)
    torch.testing.assert_close(guided.x, plain.x, rtol=1e-13, atol=1e-13)
    assert guided.evaluations == plain.evaluations
    assert [round(t, 3) for *_, t in seen] == [1.0, 0.667, 0.334, 0.001]
    x, losses, gradient, t = seen[1]
    leaf = x.clone().requires_grad_()
    expected = denoiser.predict(leaf, denoiser.path.level(t)).data.square().sum(-1)
    (wanted,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(gradient, wanted)


def test_the_gradient_goes_through_what_was_mixed() -> None:
    seen: list[tuple[Tensor, Tensor, float]] = []

    class Probe(Guidance):
        needs_gradient = True

        def after_step(self, state: State, moment: Moment) -> State:
            _, gradient = moment.gradient(lambda prediction: prediction.data.square().sum(-1))
            seen.append((moment.x, gradient, moment.level.t))
            return state

    denoiser = Labelled()
    drawn([Mix(2.0), Probe()], denoiser)
    x, gradient, t = seen[1]
    leaf = x.clone().requires_grad_()
    level = denoiser.path.level(t)
    cond, uncond = (
        denoiser.predict(leaf, level, CONDITION),
        denoiser.predict(leaf, level, {"label": torch.full((3,), 2)}),
    )
    (wanted,) = torch.autograd.grad((2 * cond.data - uncond.data).square().sum(), leaf)
    torch.testing.assert_close(gradient, wanted)


def test_resampling_moves_the_state_and_all_that_is_remembered() -> None:
    remembered: list[Tensor] = []
    states: list[Tensor] = []

    class Remembers(Guidance):
        def correct(self, prediction: Prediction, moment: Moment) -> Prediction:
            moment.memory.setdefault("first", moment.x.clone())
            return prediction

        def after_step(self, state: State, moment: Moment) -> State:
            remembered.append(moment.memory["first"])
            states.append(state.x)
            return state

    class Resamples(Guidance):
        def after_step(self, state: State, moment: Moment) -> State:
            return moment.resample(state, torch.tensor([2, 2, 0])) if moment.index == 1 else state

    condition = {"label": torch.tensor([1, 1, 1])}
    moved = drawn([Resamples(), Remembers()], condition=condition)
    assert torch.equal(remembered[1], remembered[0][[2, 2, 0]])
    assert torch.equal(states[1][0], states[1][1])
    plain = drawn([], condition=condition)
    torch.testing.assert_close(moved.x, plain.x[[2, 2, 0]], rtol=1e-13, atol=1e-13)


def test_steps_can_be_repeated() -> None:
    class Back(Guidance):
        def after_step(self, state: State, moment: Moment) -> State:
            repeated = moment.memory.setdefault("repeated", 0)
            if moment.index == 2 and repeated < 2:
                moment.memory["repeated"] = repeated + 1
                return dataclasses.replace(state, index=state.index - 1)
            return state

    assert drawn([Back()]).evaluations == GRID_STEPS + 2


def test_the_sampler_can_be_run_again_from_another_start_with_nothing_remembered() -> None:
    starts = []

    class Twice(Guidance):
        def around(self, run, start, moment):  # type: ignore[no-untyped-def]
            first = run(start)
            starts.append(first.x)
            return run(start + 1)

        def correct(self, prediction: Prediction, moment: Moment) -> Prediction:
            assert moment.memory.setdefault("index", moment.index) == 0
            return prediction

    found = drawn([Twice()])
    assert found.evaluations == 2 * GRID_STEPS
    torch.testing.assert_close(starts[0], drawn([]).x, rtol=1e-13, atol=1e-13)
    assert not torch.allclose(found.x, starts[0])


def test_noise_of_guidance_is_not_the_samplers() -> None:
    drawn_noise = []

    class Draws(Guidance):
        def after_step(self, state: State, moment: Moment) -> State:
            drawn_noise.append((moment.normal(), moment.noise.normal(moment.index)))
            return state

    drawn([Draws()])
    assert all(not torch.equal(a, b) for a, b in drawn_noise)
    assert not torch.equal(drawn_noise[0][0], drawn_noise[1][0])


def test_candidates_are_rows_of_their_own_of_which_the_first_is_kept() -> None:
    seen: list[State] = []

    class Picks(Guidance):
        candidates = 3

        def after_step(self, state: State, moment: Moment) -> State:
            seen.append(state)
            rows = torch.arange(len(state.x)) // 3 * 3 + 2  # the last of each three
            return moment.resample(state, rows)

    class Noisy(Euler):
        def step(self, state, predict, grid):  # type: ignore[no-untyped-def]
            stepped = super().step(state, predict, grid)
            return dataclasses.replace(stepped, x=stepped.x + 0.1 * state.normal())

    denoiser = Labelled()
    found = drawn([Picks()], denoiser, Noisy)
    assert found.x.shape == (3, 2)
    assert denoiser.calls == [9] * GRID_STEPS
    assert found.evaluations == 3 * GRID_STEPS
    first = seen[0].x.view(3, 3, 2)
    assert not torch.allclose(first[:, 0], first[:, 1])  # noise of their own
    assert torch.equal(found.start, drawn([], sampler=Noisy).start)
    torch.testing.assert_close(found.x, seen[-1].x[2::3])
    alone = drawn([Picks()], Labelled(), Noisy, {"label": torch.tensor([1])}, [2])
    torch.testing.assert_close(alone.x[0], found.x[2], rtol=1e-13, atol=1e-13)


def test_a_population_is_whole_or_refused() -> None:
    class Pairs(Guidance):
        population = 2

    four = {"label": torch.tensor([0, 0, 1, 1])}
    assert drawn([Pairs()], condition=four, indices=range(2, 6)).x.shape == (4, 2)
    with pytest.raises(CompositionError, match="not together"):
        drawn([Pairs()])
    with pytest.raises(CompositionError, match="not together"):
        drawn([Pairs()], condition=four, indices=range(1, 5))


def test_questions_of_its_own_are_counted_with_as_many_rows_as_they_have() -> None:
    class Asks(Guidance):
        def after_step(self, state: State, moment: Moment) -> State:
            level = moment.grid[state.index]
            moment.predict(state.x, level, moment.condition)
            twice = {"label": moment.condition["label"].repeat(2)}  # type: ignore[index]
            moment.predict(state.x.repeat(2, 1), level, twice)
            return state

        def around(self, run, start, moment):  # type: ignore[no-untyped-def]
            moment.predict(start, moment.level, moment.condition)
            return run(start)

    denoiser = Labelled()
    found = drawn([Asks()], denoiser)
    assert found.evaluations == sum(denoiser.calls) / 3 == 4 * GRID_STEPS + 1


def test_what_was_measured_reaches_every_hook_with_a_row_a_candidate() -> None:
    shapes = []

    class Half(Measurement):
        def apply(self, x: Tensor) -> Tensor:
            return x[:, :1]

        def adjoint(self, y: Tensor) -> Tensor:
            return torch.cat([y, 0 * y], 1)

    class Sees(Guidance):
        candidates = 2

        def correct(self, prediction: Prediction, moment: Moment) -> Prediction:
            assert moment.observed is not None
            shapes.append(moment.observed.residual(prediction.data).shape)
            return prediction

    denoiser, solver = Labelled(), Euler(steps=GRID_STEPS)
    observed = Observed(Half(), torch.zeros(3, 1, dtype=torch.float64))
    grid = solver.grid(denoiser.path, Uniform())
    sample(denoiser, solver, grid, range(3), condition=CONDITION, guidance=[Sees()], observed=observed)
    assert set(shapes) == {(6, 1)}


def test_each_guidance_of_a_chain_and_each_visit_of_a_step_has_numbers_of_its_own() -> None:
    seen: dict[tuple[str, int], list[Tensor]] = {}

    class Draws(Guidance):
        def __init__(self, name: str) -> None:
            self.name = name

        def after_step(self, state: State, moment: Moment) -> State:
            seen.setdefault((self.name, moment.index), []).append(moment.normal())
            return state

    class Back(Guidance):
        def after_step(self, state: State, moment: Moment) -> State:
            if moment.index == 2 and not moment.memory.get("repeated"):
                moment.memory["repeated"] = True
                return dataclasses.replace(state, index=state.index - 1)
            return state

    drawn([Draws("a"), Back(), Draws("b")])
    assert len(seen["a", 2]) == len(seen["b", 2]) == 2
    every = [each for numbers in seen.values() for each in numbers]
    assert not any(torch.equal(every[i], every[j]) for i in range(len(every)) for j in range(i))
    again = {name: list(numbers) for name, numbers in seen.items()}
    seen.clear()
    drawn([Draws("a"), Back(), Draws("b")])
    for name, numbers in again.items():
        for before, after in zip(numbers, seen[name], strict=True):
            assert torch.equal(before, after)


def test_what_the_network_said_stays_known_behind_others() -> None:
    plain = []

    class Sees(Guidance):
        def mix(self, named: Mapping[str, Prediction], moment: Moment) -> Prediction:
            plain.append((named["plain"], named["cond"]))
            return named["cond"]

    denoiser = Labelled()
    drawn([Mix(3.0), Sees()], denoiser)
    said, mixed = plain[1]
    expected = denoiser.predict(said.x, said.level, CONDITION).data
    torch.testing.assert_close(said.data, expected)
    assert not torch.allclose(mixed.data, expected)


def test_a_gradient_can_be_had_at_every_evaluation_and_the_sampler_sees_none() -> None:
    found = []

    class Each(Guidance):
        needs_every_gradient = True

        def mix(self, named: Mapping[str, Prediction], moment: Moment) -> Prediction:
            cond = named["cond"]
            (gradient,) = torch.autograd.grad(cond.data.sum(), cond.x, retain_graph=True)
            found.append(gradient)
            return cond

        def after_step(self, state: State, moment: Moment) -> State:
            assert not state.x.requires_grad
            return state

    guided = drawn([Each()], GaussianMixture(), Heun, None)
    assert len(found) == guided.evaluations == 2 * GRID_STEPS - 1
    assert all(bool(each.isfinite().all()) and float(each.abs().max()) > 0 for each in found)


def test_questions_at_the_state_are_told_the_time_that_the_sampler_tells() -> None:
    times = []

    class Late(Euler):
        def step(self, state, predict, grid):  # type: ignore[no-untyped-def]
            here, there = grid[state.index], grid[state.index + 1]
            found = predict(state.x, here, network_time=here.t / 2)
            return state.next(there.alpha * found.data + there.sigma * found.noise)

    class Timed(Labelled):
        def output(self, x: Tensor, t: Tensor, condition: Mapping[str, Tensor] | None) -> Tensor:
            times.append(float(t[0]))
            return super().output(x, t, condition)

    class Asks(Guidance):
        def correct(self, prediction: Prediction, moment: Moment) -> Prediction:
            moment.predict(moment.x, moment.level, moment.condition)
            return prediction

    drawn([Asks()], Timed(), Late)
    assert times[0::2] == times[1::2]
    assert times[0] == 0.5


def test_the_start_is_where_the_last_run_began() -> None:
    class Moves(Guidance):
        def around(self, run, start, moment):  # type: ignore[no-untyped-def]
            run(start)
            return run(2 * start)

    torch.testing.assert_close(drawn([Moves()]).start, 2 * drawn([]).start)
