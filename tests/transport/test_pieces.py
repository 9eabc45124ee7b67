"""What has come of a frame that is not whole comes out as it went in, and takes a piece more at most."""

from hypothesis import given
from hypothesis import strategies as st

from broker.transport.pieces import PIECE, Pieces

SIZES = st.sampled_from([0, 1, 100, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 7])


@given(st.lists(SIZES, max_size=8), st.binary(max_size=3), st.binary(max_size=3))
def test_what_was_added_is_joined_in_its_order(
    sizes: list[int], before: bytes, behind: bytes
) -> None:
    pieces, whole = Pieces(), b""
    for number, size in enumerate(sizes):
        data = bytes([number + 1]) * size
        pieces.add(data)
        whole += data
    assert len(pieces) == len(whole)
    assert len(whole) <= pieces.held < len(whole) + PIECE
    assert pieces.join(bytearray(before), behind) == before + whole + behind
