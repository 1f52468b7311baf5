"""Laue classes with their point groups and space groups, as in the International Tables for Crystallography A."""

from __future__ import annotations

LAUE_CLASSES = ("-1", "2/m", "mmm", "4/m", "4/mmm", "-3", "-3m", "6/m", "6/mmm", "m-3", "m-3m")
"""Names of the Laue classes, from the lowest to the highest symmetry of each family."""

_X, _Y, _Z = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
_DIAGONAL = (1.0, 1.0, 1.0)

PROPER_GROUPS: dict[str, tuple[str, tuple[tuple[int, tuple[float, float, float]], ...]]] = {
    "1": ("-1", ()),
    "2": ("2/m", ((2, _Z),)),
    "121": ("2/m", ((2, _Y),)),
    "211": ("2/m", ((2, _X),)),
    "222": ("mmm", ((2, _Z), (2, _X))),
    "4": ("4/m", ((4, _Z),)),
    "422": ("4/mmm", ((4, _Z), (2, _X))),
    "3": ("-3", ((3, _Z),)),
    "32": ("-3m", ((3, _Z), (2, _X))),
    "312": ("-3m", ((3, _Z), (2, _Y))),
    "6": ("6/m", ((6, _Z),)),
    "622": ("6/mmm", ((6, _Z), (2, _X))),
    "23": ("m-3", ((2, _Z), (3, _DIAGONAL))),
    "432": ("m-3m", ((4, _Z), (3, _DIAGONAL))),
}
"""Proper point groups: Laue class, generators as (order, axis). Two-fold axes of 32 and 622 lie along a, as in orix."""

PROPER_OF_LAUE = dict(zip(LAUE_CLASSES, ("1", "2", "222", "4", "422", "3", "32", "6", "622", "23", "432"), strict=True))
"""The proper group of each Laue class in orix's setting."""

FIRST_CENTROSYMMETRIC = dict(zip(LAUE_CLASSES, (2, 10, 47, 83, 123, 147, 164, 175, 191, 200, 221), strict=True))
"""The simplest centrosymmetric space group of each Laue class."""

_LAST_SPACE_GROUP = dict(zip(LAUE_CLASSES, (2, 15, 74, 88, 142, 148, 167, 176, 194, 206, 230), strict=True))

_TWO_FOLD_ACROSS_A = (149, 151, 153, 157, 159, 162, 163)
"""Trigonal space groups whose two-fold axes (or mirror normals) are normal to a: the setting 312, not 321."""

_POINT_GROUPS = {
    "-1": "1 -1",
    "2/m": "2 m 2/m 121 112 211 1m1 11m m11",
    "mmm": "222 mm2 mmm 22 2mm m2m",
    "4/m": "4 -4 4/m",
    "4/mmm": "422 4mm -42m -4m2 4/mmm 42",
    "-3": "3 -3",
    "-3m": "32 321 312 3m 3m1 31m -3m -3m1 -31m",
    "6/m": "6 -6 6/m",
    "6/mmm": "622 6mm -6m2 -62m 6/mmm 62",
    "m-3": "23 m-3 m3",
    "m-3m": "432 -43m m-3m m3m 43",
}
"""Point groups of each Laue class as the International Tables or EDAX ("22", "42", "62", "43") write them."""

_LAUE_OF_POINT_GROUP = {group: laue for laue, groups in _POINT_GROUPS.items() for group in groups.split()}


def laue_of_point_group(name: str) -> str | None:
    """Return the Laue class of a point group, as the International Tables or EDAX write it; None where unknown."""
    return _LAUE_OF_POINT_GROUP.get(name.strip().replace(" ", ""))


def proper_of_space_group(number: int) -> str:
    """Return the proper point group of a space group (1 to 230) in its standard setting, a key of `PROPER_GROUPS`."""
    laue = next(name for name in LAUE_CLASSES if number <= _LAST_SPACE_GROUP[name])
    if laue == "2/m":
        return "121"
    return "312" if number in _TWO_FOLD_ACROSS_A else PROPER_OF_LAUE[laue]
