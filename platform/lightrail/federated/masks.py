"""Masks that two parties agree on without a word about them, and messages that only they can read."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lightrail.errors import PluginError

__all__ = ["agreed_seed", "new_key", "opened", "pair_mask", "private_key", "public_bytes", "sealed", "stream"]

_NONCE_BYTES = 12


def _library() -> Any:
    try:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives import ciphers, hashes
        from cryptography.hazmat.primitives.asymmetric import x25519
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    except ImportError as error:
        raise PluginError(
            "secure aggregation needs the library 'cryptography'",
            found="it is not installed",
            allowed="lightrail with its extra 'privacy'",
            remedy="Run: pip install 'lightrail[privacy]'",
        ) from error
    return SimpleNamespace(
        InvalidTag=InvalidTag, ciphers=ciphers, hashes=hashes, x25519=x25519, AESGCM=AESGCM, HKDF=HKDF
    )


def new_key() -> Any:
    """A fresh private key of X25519.

    Raises:
        PluginError: The library ``cryptography`` is not installed.
    """
    return _library().x25519.X25519PrivateKey.generate()


def private_key(secret: bytes) -> Any:
    """The private key of 32 bytes."""
    return _library().x25519.X25519PrivateKey.from_private_bytes(secret)


def public_bytes(key: Any) -> bytes:
    """The public key that belongs to a private one, 32 bytes."""
    return key.public_key().public_bytes_raw()


def agreed_seed(key: Any, other: bytes, purpose: str) -> bytes:
    """32 bytes that two parties compute alike, each of its private key and of the public key of the other.

    Args:
        key: Its private key.
        other: The public key of the other, 32 bytes.
        purpose: What the seed is for; seeds for different purposes tell nothing of each other.

    Raises:
        ValueError: ``other`` is no public key.

    Example:
        >>> a, b = new_key(), new_key()
        >>> agreed_seed(a, public_bytes(b), "test") == agreed_seed(b, public_bytes(a), "test")
        True
    """
    library = _library()
    common = key.exchange(library.x25519.X25519PublicKey.from_public_bytes(other))
    derive = library.HKDF(
        library.hashes.SHA256(), length=32, salt=None, info=b"lightrail secure sum: " + purpose.encode()
    )
    return derive.derive(common)


def stream(seed: bytes, size: int) -> Tensor:
    """PRG(seed): uniform numbers modulo 2³², of AES-256 in counter mode.

    Args:
        seed: 32 bytes, for one stream only.
        size: d.

    Returns:
        int32 ``[d]``, over all values.

    Example:
        >>> torch.equal(stream(bytes(32), 5), stream(bytes(32), 9)[:5])
        True
    """
    ciphers = _library().ciphers
    cipher = ciphers.Cipher(ciphers.algorithms.AES(seed), ciphers.modes.CTR(bytes(16))).encryptor()
    return torch.frombuffer(bytearray(cipher.update(bytes(4 * size))), dtype=torch.int32)


def pair_mask(key: Any, other: bytes, index: int, other_index: int, size: int) -> Tensor:
    r"""What the client ``index`` adds for a pair; the other adds the opposite.

    .. math:: \pm \mathrm{PRG}(s_{ij}), \qquad + \text{ where } j > i

    Args:
        key: Its private key.
        other: The public key of the other.
        index: i.
        other_index: j.
        size: d.

    Returns:
        int32 ``[d]``.
    """
    mask = stream(agreed_seed(key, other, "mask"), size)
    return mask if other_index > index else mask.neg_()


def sealed(seed: bytes, message: bytes, route: bytes) -> bytes:
    """A message that only those who know the seed can read, and nobody can change, or send elsewhere.

    Args:
        seed: 32 bytes.
        message: What is sealed.
        route: Who sends it to whom.

    Example:
        >>> opened(bytes(32), sealed(bytes(32), b"seven", b"0 to 1"), b"0 to 1")
        b'seven'
    """
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + _library().AESGCM(seed).encrypt(nonce, message, route)


def opened(seed: bytes, message: bytes, route: bytes) -> bytes:
    """What was sealed.

    Raises:
        ValueError: The message was changed, or is not for this route.
    """
    library = _library()
    try:
        return library.AESGCM(seed).decrypt(message[:_NONCE_BYTES], message[_NONCE_BYTES:], route)
    except (library.InvalidTag, ValueError) as error:
        raise ValueError(f"the message {route.decode()} was changed on its way") from error
