# SPDX-License-Identifier: Apache-2.0
"""The certificate that REST is served with, taken anew when its files change.

Threading: one thread; connections that are open keep what they began with.
"""

from __future__ import annotations

import logging
import os
import ssl
import stat

from loracache.errors import ConfigError

__all__ = ["Certificate", "load_certificate"]

_log = logging.getLogger(__name__)
_NOT_FOR_OTHERS = 0o027  # a group may read a key: that is how hosts share one among services


def load_certificate(cert: str, key: str) -> ssl.SSLContext:
    """A server's context, TLS 1.2 and up. Raises ConfigError naming the file, and nothing that stands in it."""
    try:
        mode = stat.S_IMODE(os.stat(key).st_mode)
        with open(cert, "rb"), open(key, "rb"):
            pass
    except OSError as error:
        raise ConfigError(f"tls_cert and tls_key: {error.filename!r} cannot be read: {error.strerror}") from None
    if mode & _NOT_FOR_OTHERS:
        raise ConfigError(f"tls_key={key!r} has mode {mode:04o}, so that others can use it; chmod 600 it")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        why = getattr(error, "reason", None) or "not what it should be"
        raise ConfigError(
            f"tls_cert={cert!r} and tls_key={key!r} are not a certificate chain and its key in PEM, without a "
            f"passphrase ({why.lower().replace('_', ' ')})"
        ) from None
    return context


class Certificate:
    """A context, and the files it follows."""

    def __init__(self, cert: str, key: str) -> None:
        self._files = (cert, key)
        self._seen = self._look()
        self.context = load_certificate(cert, key)

    def refresh(self) -> None:
        """Load the files again where they changed; a pair that does not fit stays out, and is told once."""
        seen = self._look()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            # Tried in another context first: a failed load leaves half of a pair behind.
            load_certificate(*self._files)
            self.context.load_cert_chain(*self._files, password=_no_password)
        except (ConfigError, OSError) as error:
            _log.error("the certificate stays as it was: %s", error)
        else:
            _log.warning("the certificate was loaded anew")

    def _look(self) -> list[tuple[int, ...]]:
        seen: list[tuple[int, ...]] = []
        for file in self._files:
            try:
                found = os.stat(file)
                seen.append((found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size))
            except OSError as error:
                seen.append((error.errno or 0,))
        return seen


def _no_password() -> str:
    """For a key that has one: without this, OpenSSL would ask for it at the terminal."""
    return ""
