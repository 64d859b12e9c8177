"""Which action units belong to an expression, and where they lie in a face of 68 landmarks.

"official" is what the authors' code does. "corrected" departs from it where code and paper disagree or where the two
halves of a face are treated differently: disgust has AU10 (upper lip raiser), as in the paper's figure, in place of
AU5; AU10 and AU20 use mirrored landmarks on the right; AU17 is centred on the chin; the height of AU4 does not depend
on how the head is tilted (officially half the height difference of the brows, 10 pixels only where that is 0); eyes
use both landmarks of each lid; and no coordinate is cut to whole pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

Codebook = Literal["official", "corrected"]

CODEBOOKS: dict[str, dict[str, tuple[int, ...]]] = {
    "official": {
        "neutral": (),
        "anger": (4, 5, 7, 10, 17, 23, 24, 25, 26),
        "disgust": (9, 5, 16, 17, 25, 26),
        "fear": (1, 2, 4, 5, 20, 25, 26, 27),
        "happiness": (6, 12, 25),
        "sadness": (1, 4, 6, 15, 17),
        "surprise": (1, 2, 5, 26, 27),
    }
}
CODEBOOKS["corrected"] = {**CODEBOOKS["official"], "disgust": (9, 10, 16, 17, 25, 26)}


class Span(NamedTuple):
    """Half the distance from landmarks `first` to landmarks `last` (means), plus `extra`; `default` where it is 0.

    A negative distance counts as 0.
    """

    first: tuple[int, ...]
    last: tuple[int, ...]
    extra: float = 0.0
    default: float = 5.0


class Ellipse(NamedTuple):
    """A filled ellipse: centre at the mean x and mean y of some landmarks, shifted by (dx, dy); half-axes rx and ry.

    Lengths are in pixels of a face image of 256 x 256.
    """

    x: tuple[int, ...]
    y: tuple[int, ...]
    rx: float | Span
    ry: float | Span
    dx: float = 0.0
    dy: float = 0.0


def _at(*landmarks: int, rx: float | Span = 20.0, ry: float | Span = 20.0, dx: float = 0.0, dy: float = 0.0) -> Ellipse:
    return Ellipse(landmarks, landmarks, rx, ry, dx, dy)


Lids = tuple[tuple[int, ...], tuple[int, ...]]  # upper and lower
Geometry = Mapping[int, Sequence[Ellipse]]


def _eyes(left: Lids, right: Lids, extra: float = 0.0, default: float = 5.0) -> tuple[Ellipse, ...]:
    return tuple(
        Ellipse((outer, inner), upper + lower, Span((outer,), (inner,)), Span(upper, lower, extra, default))
        for outer, inner, (upper, lower) in ((36, 39, left), (42, 45, right))
    )


_MOUTH = (Ellipse((48, 54), (51, 57), Span((48,), (54,)), Span((51,), (57,))),)
_CORNERS = (_at(48), _at(54))
_LIDS: tuple[Lids, Lids] = (((38,), (41,)), ((44,), (47,)))
_BOTH_LIDS: tuple[Lids, Lids] = (((37, 38), (40, 41)), ((43, 44), (46, 47)))

OFFICIAL: Geometry = {
    1: (_at(20, rx=32, ry=26), _at(23, rx=32, ry=26)),
    2: (_at(18, rx=32, ry=26), _at(25, rx=32, ry=26)),
    4: (_at(19, 24, rx=Span((19,), (24,), default=10), ry=Span((19,), (24,), default=10)),),
    5: _eyes(*_LIDS),
    6: (_at(41, rx=26, ry=26, dy=43), _at(46, rx=26, ry=26, dy=43)),
    7: _eyes(*_LIDS, extra=10),
    9: (Ellipse((31,), (29,), 20, 20), Ellipse((35,), (29,), 20, 20)),
    10: (Ellipse((48,), (50,), 20, 20), Ellipse((52,), (54,), 20, 20)),
    12: _CORNERS,
    14: (_at(48, dx=-20), _at(54, dx=20)),
    15: _CORNERS,
    16: (_at(59), _at(55)),
    17: (_at(59, 8, rx=Span((59,), (8,)), ry=Span((59,), (8,))),),
    20: (_at(48, 6), _at(50, 10)),
    23: _MOUTH,
    24: _MOUTH,
    25: (_at(51, rx=25, ry=10), _at(57, rx=25, ry=10)),
    26: _MOUTH,
    27: _MOUTH,
    43: _eyes(*_LIDS, extra=10, default=0),
}
CORRECTED: Geometry = {
    **OFFICIAL,
    4: (_at(19, 24, rx=Span((19,), (24,), default=10), ry=10),),
    5: _eyes(*_BOTH_LIDS),
    7: _eyes(*_BOTH_LIDS, extra=10),
    10: (Ellipse((48,), (50,), 20, 20), Ellipse((54,), (52,), 20, 20)),
    17: (_at(57, 8, rx=Span((59,), (55,)), ry=Span((57,), (8,))),),
    20: (_at(48, 6), _at(54, 10)),
    43: _eyes(*_BOTH_LIDS, extra=10, default=0),
}
