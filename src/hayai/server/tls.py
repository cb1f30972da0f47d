"""TLS: a certificate and its key, checked before the model is loaded, read again when they are renewed."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

from hayai.config import ServerConfig
from hayai.errors import ConfigError

_log = logging.getLogger("hayai.server")


class Certificate:
    """The PEM files of a server and the context that new connections use; TLS 1.2 or newer.

    ConfigError: a file can't be read, is no certificate or key, or they don't belong together.
    """

    def __init__(self, cert: Path, key: Path) -> None:
        self._cert, self._key = cert, key
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._seen = self._times()
        self._load()

    def refresh(self) -> None:
        """Take up renewed files for new connections. What can't be used is logged, the old ones stay."""
        try:
            times = self._times()
            if times != self._seen:
                self._seen = times
                # first elsewhere: a context keeps a new certificate also when its key turns out not to fit
                Certificate(self._cert, self._key)
                self._load()
                _log.warning("the TLS certificate %s was renewed", self._cert)
        except ConfigError as error:
            _log.error("the TLS certificate is not renewed: %s", error)

    def _times(self) -> tuple[int, int]:
        try:
            return self._cert.stat().st_mtime_ns, self._key.stat().st_mtime_ns
        except OSError as error:
            raise ConfigError(f"can't read the TLS file {error.filename}: {error.strerror}") from None

    def _load(self) -> None:
        for path in (self._cert, self._key):
            try:
                path.open("rb").close()
            except OSError as error:
                raise ConfigError(f"can't read the TLS file {path}: {error.strerror}") from None
        try:
            # a password can't be asked for while a server starts: an encrypted key is an error
            self.context.load_cert_chain(self._cert, self._key, password=lambda: "")
        except (ssl.SSLError, OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or str(error)
            raise ConfigError(
                f"{self._cert} and {self._key} are not a PEM certificate and its unencrypted key: {reason}"
            ) from None


def certificate_of(config: ServerConfig) -> Certificate | None:
    """The certificate that the configuration names, None without TLS."""
    if config.tls_cert is None or config.tls_key is None:
        return None
    return Certificate(config.tls_cert, config.tls_key)
