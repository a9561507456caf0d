"""Weights & Biases."""

from __future__ import annotations

import contextlib
import netrc
import os
import secrets
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightrail.errors import ConfigurationError, RunFolderError
from lightrail.files import replace_file
from lightrail.options import one_of

__all__ = ["Wandb"]

MODES = ("auto", "online", "offline", "disabled")
STEP = "step"
ID_FILE = "wandb_id.txt"


class Wandb(Logger):
    """Logs to Weights & Biases: online for who is logged in, into the run folder for who is not, never with a question.

    Nothing is imported or started before the first metrics arrive. A run that goes on in its folder, or from a
    checkpoint, goes on under the same id. It stays open between training and test; it ends with :meth:`close`, with the
    process, or with an error.

    Args:
        folder: Where W&B keeps its files; the run folder under ``train``.
        project: The W&B project.
        name: What the run is called; the name of its folder where none is given.
        mode: ``auto`` obeys ``WANDB_MODE``, else is online where an API key is stored or in ``WANDB_API_KEY``, else
            offline (``wandb sync`` uploads such a run later); ``online``, ``offline``, or ``disabled``.
        tags: Words to find the run by.
        group: The name of a group of runs.

    Raises:
        ConfigurationError: ``mode`` is ``online`` and nobody is logged in.

    Example:
        >>> logger = Wandb(mode="disabled")
        >>> logger.log_metrics({"loss": 1.0}, step=1)
    """

    _open: ClassVar[Wandb | None] = None

    def __init__(
        self,
        folder: str | None = None,
        project: str = "lightrail",
        name: str | None = None,
        mode: Literal["auto", "online", "offline", "disabled"] = "auto",
        tags: list[str] | None = None,
        group: str | None = None,
    ) -> None:
        super().__init__()
        one_of(MODES, mode=mode)
        if mode == "online" and not _is_logged_in():
            raise ConfigurationError(
                "nobody is logged in to Weights & Biases",
                found="logger.wandb.mode=online without an API key",
                allowed="a stored login, or the variable WANDB_API_KEY",
                remedy="Run `wandb login`, or set logger.wandb.mode=offline.",
            )
        self._folder = Path(folder or ".")
        # Only a folder that was named is one run's; in the working directory others may start.
        self._id_file = Path(folder) / ID_FILE if folder else None
        self._project = project
        self._name = name or (self._folder.resolve().name if folder else None)
        self._mode = mode
        self._tags = list(tags or ())
        self._group = group
        self._id: str | None = None
        self._config: dict[str, Any] = {}
        self._run: Any = None

    # Lightning touches an attribute `experiment` of every logger at set-up; without one, nothing starts early.

    @property
    def name(self) -> str | None:
        """The W&B project."""
        return self._project

    @property
    def version(self) -> str | None:
        """The id of the W&B run; ``None`` before the first metrics."""
        return self._id

    @property
    def save_dir(self) -> str:
        """Where W&B keeps its files."""
        return str(self._folder)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Keeps the configuration for the start of the run, or adds it to one that has started."""
        values = dict(params) if isinstance(params, Mapping) else dict(vars(params))
        self._config.update(values)
        if self._run is not None:
            self._run.config.update(values, allow_val_change=True)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs the metrics at a step; the first call starts the W&B run."""
        if self._run is None and self._mode != "disabled":
            self._run = self._start()
        if self._run is not None:
            # The step is a metric: W&B's own counter would drop what a resumed run logs for the second time.
            self._run.log({**metrics, **({} if step is None else {STEP: step})})

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        """Logs pictures, as files or arrays, under one name; starts the W&B run where nothing has."""
        if self._run is None and self._mode != "disabled":
            self._run = self._start()
        if self._run is not None:
            import wandb

            shown = [wandb.Image(each) for each in images]
            self._run.log({key: shown, **({} if step is None else {STEP: step})})

    def _start(self) -> Any:
        import wandb.errors

        if Wandb._open is not None:
            Wandb._open.close()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._id = self._settled_id()
        chosen = self._resolved_mode()
        for mode in dict.fromkeys((chosen, "offline")):
            try:
                with _silence():
                    run = self._init(mode)
                    run.define_metric(STEP)
                    run.define_metric("*", step_metric=STEP)
            except wandb.errors.Error as error:
                warnings.warn(f"Weights & Biases does not start {mode}: {error}", stacklevel=2)
            else:
                Wandb._open = self
                return run
        # A run is worth more than its log.
        self._mode = "disabled"
        return None

    def _settled_id(self) -> str:
        """The id that a checkpoint named, else that of an earlier start in this folder, else a new one.

        It is written down before W&B starts, since a run may die before its first checkpoint.
        """
        kept = ""
        if self._id_file is not None:
            with contextlib.suppress(OSError):
                kept = self._id_file.read_text().strip()
        settled = self._id or kept or secrets.token_hex(4)
        if self._id_file is not None and settled != kept:
            with contextlib.suppress(RunFolderError):
                replace_file(self._id_file, settled.encode())
        return settled

    def _init(self, mode: str) -> Any:
        import wandb

        return wandb.init(
            dir=str(self._folder),
            project=self._project,
            name=self._name,
            id=self._id,
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            config=self._config,
            tags=self._tags or None,
            group=self._group,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def _resolved_mode(self) -> str:
        if self._mode != "auto":
            return self._mode
        asked = {"dryrun": "offline"}.get(variable := os.environ.get("WANDB_MODE", "").lower(), variable)
        if asked in ("offline", "disabled"):
            return asked
        return "online" if _is_logged_in() else "offline"

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Ends the W&B run as failed after an error; after a success the run stays open, for the test that follows."""
        if status != "success":
            self.close(exit_code=1)

    @rank_zero_only
    def close(self, exit_code: int = 0) -> None:
        """Ends the W&B run; what is not yet written or sent is."""
        if self._run is None:
            return
        with _silence():
            self._run.finish(exit_code=exit_code)
        self._run = None
        if Wandb._open is self:
            Wandb._open = None

    def state_dict(self) -> dict[str, Any]:
        """The id under which a resumed run goes on."""
        return {"id": self._id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._id = state["id"]


def _is_logged_in() -> bool:
    """Whether an API key is in the environment or stored, as ``wandb login`` stores it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]:
        with contextlib.suppress(OSError, netrc.NetrcParseError, RuntimeError):
            if netrc.netrc(path.expanduser()).authenticators(host):
                return True
    return False


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps W&B from writing to the console, which belongs to the progress bar."""
    before = os.environ.get("WANDB_SILENT")
    os.environ["WANDB_SILENT"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_SILENT"]
        else:
            os.environ["WANDB_SILENT"] = before
