"""Clients on other machines: a SuperLink here, a SuperNode with each of them."""

from __future__ import annotations

from pathlib import Path

from flwr.serverapp import Grid

from lightrail.federated.flower.exchange import FlowerTransport
from lightrail.federated.flower.superlink import Certificates, SuperLink, parse_address
from lightrail.federated.flower.terms import Terms

__all__ = ["FlowerDeployment"]


class FlowerDeployment(FlowerTransport):
    """Carries rounds to clients that ``lightrail federated client`` started, wherever they are.

    Args:
        terms: What clients are told, and how long they are waited for.
        address: ``HOST:PORT`` to listen on; ``0.0.0.0`` for every network of this machine.
        certificates: A folder with ``ca.pem``, ``server.pem`` and ``server.key``, and ``clients/NUMBER.pub`` where only
            nodes with these keys may connect; ``None`` for no encryption.
        log: Where what the SuperLink says goes.

    Raises:
        ConfigurationError: An address that is none, or a certificate that is missing.
    """

    def __init__(
        self,
        terms: Terms,
        address: str = "0.0.0.0:8000",
        certificates: Path | None = None,
        log: Path = Path("superlink.log"),
    ) -> None:
        super().__init__(terms)
        parse_address(address)
        self._address, self._log = address, log
        self._certificates = None if certificates is None else Certificates(certificates)
        self._superlink: SuperLink | None = None

    def connect(self, clients: int) -> Grid:
        self._superlink = SuperLink(self._address, self._certificates, self._log)
        return self._superlink.grid

    def disconnect(self) -> None:
        if self._superlink is not None:
            self._superlink.stop()
            self._superlink = None

    def check(self) -> None:
        if self._superlink is not None:
            self._superlink.check()
