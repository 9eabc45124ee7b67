"""A client's end of TLS 1.3 that does what Python's does not: it changes its keys whenever it is told to."""

import ctypes
from ctypes.util import find_library
from typing import Final

_BUFFER: Final = 2**16
_POINTERS: Final = {
    "ssl": ("TLS_client_method", "SSL_CTX_new", "SSL_new"),
    "crypto": ("BIO_s_mem", "BIO_new"),
}


def _library(name: str) -> ctypes.CDLL:
    library = ctypes.CDLL(find_library(name))
    for function in _POINTERS[name]:
        getattr(library, function).restype = ctypes.c_void_p
    return library


class RawTls:
    """OpenSSL over two buffers: what it says is taken by `said`, what it hears is given to `hear`. For a test that
    ends with its process: nothing is freed."""

    def __init__(self) -> None:
        self._ssl, self._crypto = _library("ssl"), _library("crypto")
        pointer = ctypes.c_void_p
        context = pointer(self._ssl.SSL_CTX_new(pointer(self._ssl.TLS_client_method())))
        self._end = pointer(self._ssl.SSL_new(context))
        kind = pointer(self._crypto.BIO_s_mem())
        self._coming, self._going = (pointer(self._crypto.BIO_new(kind)) for _ in range(2))
        self._ssl.SSL_set_bio(self._end, self._coming, self._going)
        self._buffer = ctypes.create_string_buffer(_BUFFER)

    def shake_hands(self) -> bool:
        """Go on with the handshake; whether it is over."""
        return bool(self._ssl.SSL_connect(self._end) == 1)

    def said(self) -> bytes:
        """All that is to be sent."""
        said = b""
        while (size := self._crypto.BIO_read(self._going, self._buffer, _BUFFER)) > 0:
            said += self._buffer.raw[:size]
        return said

    def hear(self, data: bytes) -> None:
        self._crypto.BIO_write(self._coming, data, len(data))

    def read(self) -> bytes:
        """The data in what was heard; empty if there is none."""
        size = self._ssl.SSL_read(self._end, self._buffer, _BUFFER)
        return self._buffer.raw[: max(0, size)]

    def write(self, data: bytes) -> None:
        self._ssl.SSL_write(self._end, data, len(data))

    def change_keys(self, *, both: bool) -> None:
        """Change the key for what is said; `both`: and ask the peer to do so."""
        self._ssl.SSL_key_update(self._end, int(both))
        self._ssl.SSL_do_handshake(self._end)
