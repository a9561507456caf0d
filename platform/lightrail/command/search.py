"""``lightrail search NAME``: fits something to a model, once, and says how later runs use it."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightrail.errors import ConfigurationError, PluginError, closest

if TYPE_CHECKING:
    from torch import Tensor

    from lightrail.configuration import Chosen
    from lightrail.generation.composed import Generation
    from lightrail.generation.search import Artefact, Search, SearchProblem

__all__ = ["main", "using"]

# Of the data, enough for a distance between distributions.
MOST_DATA = 2048


def main(arguments: Sequence[str]) -> int:
    """Runs one search.

    Args:
        arguments: The words after ``lightrail search``.

    Returns:
        The exit status.

    Raises:
        UserError: Something that the user can mend.
    """
    from lightrail import configuration
    from lightrail.generation.composed import normalised

    options, words = _parser().parse_known_args(arguments)
    words = [*options.words, *words]
    if options.help or not words:
        print(configuration.help_text("search", options.config_dir))
        return 0
    name, overrides, target = _split(words)
    overrides = [f"search={name}", *overrides]
    if options.cfg:
        from omegaconf import OmegaConf

        composition = configuration.compose(normalised(overrides), config_name="search", config_dirs=options.config_dir)
        print(OmegaConf.to_yaml(composition.config), end="")
        return 0
    _search(name, overrides, target, options.config_dir)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightrail search", add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--cfg", action="store_true")
    parser.add_argument("--config-dir", "-cd", action="append", default=[])
    return parser


def _split(words: Sequence[str]) -> tuple[str, list[str], Path | None]:
    """The name of the search, the overrides, and where its file goes, if that was said."""
    from lightrail.catalogue import available

    names = [word for word in words if "=" not in word]
    known = available("search")
    if len(names) != 1 or names[0] not in known:
        word = names[-1] if names else "no name"
        raise PluginError(
            f"there is no search '{word}'" if names else "it is not said what to search",
            found=" ".join(words),
            allowed=f"one of {', '.join(known)}",
            remedy=f"{closest(word, known)}Name one: lightrail search NAME run=FOLDER …",
        )
    targets = [word.partition("=")[2] for word in words if word.startswith("search.to=")]
    overrides = [word for word in words if "=" in word and not word.startswith("search.to=")]
    if targets and Path(targets[-1]).suffix != ".json":
        raise ConfigurationError(
            "the file of a search ends in .json",
            found=f"search.to={targets[-1]}",
            allowed="a name that ends in .json",
            remedy="Add the ending, or leave search.to out.",
        )
    return names[0], overrides, Path(targets[-1]) if targets else None


def _search(name: str, overrides: list[str], target: Path | None, config_dirs: Sequence[str]) -> None:
    from lightrail.catalogue import import_target
    from lightrail.generation.composed import compose_generation
    from lightrail.run.build import call, options_of

    generation = compose_generation(overrides, config_dirs=config_dirs, config_name="search")
    for note in generation.notes:
        print(f"note: {note}", file=sys.stderr)
    chosen = _chosen(generation, "search")
    kind = import_target(chosen.target)
    search: Search = call(kind, chosen, options_of(kind, chosen, {}))
    problem = _problem(generation)
    path = target or _near(_default_path(generation, name, problem))
    progress = _Progress(name)
    try:
        artefact = search.search(problem, progress)
    finally:
        progress.close()
    artefact.save(path)
    print(_table(artefact, search))
    print(f"\nwritten to {path}\nuse it:\n  {shlex.join(using(generation, search, artefact, path))}")


def _chosen(generation: Generation, kind: str) -> Chosen:
    return next(each for each in generation.composition.chosen if each.kind == kind)


def _problem(generation: Generation) -> SearchProblem:
    from lightrail.generation.search import SearchProblem

    denoiser = generation.denoiser
    request = generation.request
    assert generation.time_grid is not None
    sampler = _chosen(generation, "sampler")
    condition = {key: request[key] for key in ("label", "prompt") if request.get(key) is not None}
    steering = [
        {"name": each.name, "options": each.options}
        for each in generation.composition.chosen
        if each.kind in ("guidance", "sampler_wrapper")
    ]
    return SearchProblem(
        denoiser,
        generation.solver,
        generation.time_grid,
        generation.levels,
        generation.seed,
        lambda indices: denoiser.condition(request, indices),
        generation.guidance,
        # Of one class or one prompt the data as a whole are no measure.
        None if condition else _data(generation),
        {"sampler": sampler.name, "options": sampler.options, "condition": {**condition, "steered_by": steering}},
        batch_size=int(request["batch_size"]),
    )


def _data(generation: Generation) -> Tensor | None:
    """Samples of the training set as states, ``[N, *shape]``; ``None`` where it has none that can be told apart."""
    import torch

    trained = generation.trained
    if trained is None or trained.data is None:
        return None
    denoiser, parts = generation.denoiser, []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generation.seed)  # loaders shuffle
        trained.data.prepare_data()
        trained.data.setup("fit")
        for batch in trained.data.train_dataloader():
            found: Any = batch[0] if isinstance(batch, tuple | list) else batch
            if not isinstance(found, torch.Tensor):
                return None
            parts.append(denoiser.encode(found.to(denoiser.device)).to(denoiser.dtype))
            if sum(map(len, parts)) >= MOST_DATA:
                break
    return torch.cat(parts)[:MOST_DATA] if parts else None


def _default_path(generation: Generation, name: str, problem: SearchProblem) -> Path:
    """``searched/`` in the folder of the run, or here for a model without one."""
    trained = generation.trained
    folder = Path() if trained is None or trained.folder is None else trained.folder
    return folder / "searched" / f"{name}_{_chosen(generation, 'sampler').name}_{problem.sampler.steps}.json"


def using(generation: Generation, search: Search, artefact: Artefact, path: Path) -> list[str]:
    """The command that samples with what was found.

    Args:
        generation: What was searched on.
        search: The search.
        artefact: What it found.
        path: Where that lies.
    """
    replaced = {*search.replaces, "search"}
    kept, named = [], set()
    for word in generation.composition.overrides:
        key = word.partition("=")[0].lstrip("+")
        group = key.split(".")[0]
        if group in replaced:
            continue
        named.add(group)
        kept.append(word)
    folder = None if generation.trained is None else generation.trained.folder
    if folder is not None:
        # "latest" may be another run by then.
        kept = [f"run={_near(folder)}" if word.startswith(("run=", "run.from=")) else word for word in kept]
    for group in ("sampler", "time_grid"):
        if group not in named and group not in replaced:
            kept.append(f"+{group}={_chosen(generation, group).name}")
    return ["generate", *kept, *search.words(artefact, str(path))]


def _near(path: Path) -> Path:
    """A path as one would type it from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _table(artefact: Artefact, search: Search) -> str:
    """The scores on samples that the search never saw, before and after."""
    names = list(artefact.before)
    width = max(map(len, names), default=0)
    rows = [f"{'':<{width}}   {'before':>10}   {'after':>10}"]
    rows += [f"{name:<{width}}   {artefact.before[name]:>10.4g}   {artefact.after[name]:>10.4g}" for name in names]
    count = getattr(search, "held_out", None)
    heading = f"{artefact.search} · {artefact.key['sampler']} · {artefact.key['steps']} steps"
    return "\n".join([f"{heading} · {count} held-out samples" if count else heading, *rows])


class _Progress:
    """A live line on a terminal, nothing elsewhere."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._bar: Any = None

    def __call__(self, done: int, total: int, score: float | None = None) -> None:
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=self._name, unit=" trials", leave=False, dynamic_ncols=True)
        self._bar.update(done - self._bar.n)
        if score is not None:
            self._bar.set_postfix_str(f"best {score:.4g}", refresh=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
