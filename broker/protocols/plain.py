"""The plain protocol: a bare WebSocket, each message for the app (wire reference, section 1)."""

from collections.abc import Sequence

from broker.core.json_reader import value_of
from broker.core.messages import Publication
from broker.protocols.commands import BadCommand
from broker.protocols.json_text import check_json
from broker.transport import frames


class Plain:
    """Writes frames for a peer that speaks no protocol of its own.

    JSON text arrives as that text, unless it is a single JSON string, which arrives as its content;
    other data arrives as a binary frame.
    """

    name = "plain"
    opaque_payloads = False

    def publication(self, name: str, publication: Publication) -> bytes:
        """One publication, as a text frame; a plain peer is not told the topic."""
        if publication.opaque:
            head, data, _ = self.pieces(name, publication)
            return head + data
        return self.message(publication.data)

    def pieces(self, name: str, publication: Publication) -> tuple[bytes, bytes, bytes]:
        """The same, header and data apart."""
        data = publication.data
        if publication.opaque:
            try:
                data = check_json(data)
            except BadCommand:
                return frames.binary_header(len(data)), data, b""
        text = _text(data)
        return frames.text_header(len(text)), text, b""

    def publications(self, name: str, publications: Sequence[Publication]) -> Sequence[bytes]:
        """Several, each in a frame of its own."""
        return [self.publication(name, publication) for publication in publications]

    def message(self, data: bytes) -> bytes:
        """One JSON value as a text frame."""
        return frames.text_frame(_text(data))

    def text_frame(self, payload: bytes) -> bytes:
        """One message of the app, which must be UTF-8."""
        return frames.text_frame(payload)

    def binary_frame(self, payload: bytes) -> bytes:
        """One message of the app."""
        return frames.binary_frame(payload)


def _text(data: bytes) -> bytes:
    return str(value_of(data)).encode() if data[:1] == b'"' else data


PLAIN = Plain()
