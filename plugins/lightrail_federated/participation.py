"""How much a client does in a round, and who has to be there."""

from __future__ import annotations

from lightrail.errors import ConfigurationError
from lightrail.federated import Client, ServerMethod

__all__ = ["require_everyone", "steps_of_visit"]


def steps_of_visit(method: ServerMethod, client: Client) -> int:
    """Steps of a client that makes its steps itself: ``local_steps``, or as many as ``local_epochs`` passes have.

    Args:
        method: With the options.
        client: Whose samples are passed over.
    """
    return method.local_steps if method.local_steps is not None else method.local_epochs * len(client.loader())


def require_everyone(name: str, method: ServerMethod) -> None:
    """Refuses rounds in which only some clients take part.

    Args:
        name: Of the method.
        method: With the options.

    Raises:
        ConfigurationError: ``fraction`` or ``sampling`` ask for some of the clients.
    """
    if method.fraction != 1 or method.sampling != "fixed":
        raise ConfigurationError(
            f"{name} says itself which clients take part in a round",
            found=f"federated.fraction={method.fraction}, federated.sampling={method.sampling}",
            allowed="federated.fraction=1 and federated.sampling=fixed",
            remedy="Leave federated.fraction and federated.sampling out, or choose another method.",
        )
