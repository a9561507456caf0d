"""A client's own state between rounds, on its own disk: it is never sent."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors.torch import load_file, save_file

from lightrail.federated.wire import Wire
from lightrail.files import replacing

__all__ = ["StateFolder"]

# A server that goes on from an older checkpoint asks for older states.
_KEPT = 4


class StateFolder:
    """The states of one client in one run, a file a round.

    A round counts only once the server has its answer. A client therefore goes on from the state after the last round
    that counted, which is not always the last that it worked in: an answer was late, or the server went back.

    Args:
        folder: The client's own.
        run: The run's name: 32 hexadecimal digits.

    Raises:
        ValueError: ``run`` is something else.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     states = StateFolder(Path(folder), "0" * 32)
        ...     states.save(3, {"c": torch.tensor([2.0])})
        ...     StateFolder(Path(folder), "0" * 32).load(3)["c"]
        tensor([2.])
    """

    def __init__(self, folder: Path, run: str) -> None:
        # It becomes a part of a path, and comes from elsewhere.
        if not re.fullmatch(r"[0-9a-f]{32}", run):
            raise ValueError("a run's name is 32 hexadecimal digits")
        self.path = folder / run

    def load(self, round: int) -> Wire:  # noqa: A002  (the word of the contract)
        """The state after a round.

        Raises:
            LookupError: It is not here.
        """
        path = self._file(round)
        if not path.is_file():
            raise LookupError(f"no state after round {round} in {self.path}")
        return load_file(path)

    def save(self, round: int, state: Wire) -> None:  # noqa: A002
        """Keeps the state after a round, and forgets what is older than the last few.

        Raises:
            RunFolderError: It cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with replacing(self._file(round)) as temporary:
            save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, temporary)
        for old in sorted(self.path.glob("round-*.safetensors"))[:-_KEPT]:
            old.unlink(missing_ok=True)

    def forget_after(self, round: int) -> None:  # noqa: A002
        """Drops the states after later rounds, which did not count."""
        for path in self.path.glob("round-*.safetensors"):
            if path.name > self._file(round).name:
                path.unlink(missing_ok=True)

    def _file(self, round: int) -> Path:  # noqa: A002
        return self.path / f"round-{round:08d}.safetensors"
