"""Read the bundle-adjustment problems in `examples/data/bundle`."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DATA_DIR", "Scene", "read"]

DATA_DIR = Path(__file__).resolve().parent.parent / "data" / "bundle"


@dataclasses.dataclass(frozen=True)
class Scene:
    """Cameras, points, and the markers that show which camera saw which point where.

    Attributes
    ----------
    intrinsics
        Focal length, centre (2), radial (3) and tangential (2) distortion, of all cameras.
    turn, shift
        (cameras, 3, 3) and (cameras, 3): a camera sees X at R·X + t.
    points
        (points, 3).
    camera, point
        (markers,), which camera saw which point.
    xy
        (markers, 2), where, in pixels.
    """

    intrinsics: tuple[float, ...]
    turn: NDArray[np.float64]
    shift: NDArray[np.float64]
    points: NDArray[np.float64]
    camera: NDArray[np.int64]
    point: NDArray[np.int64]
    xy: NDArray[np.float64]


@functools.cache
def read(name: str) -> Scene:
    """Return what a file holds.

    The layout, little endian: two bytes (byte order, image space), eight float32 of
    intrinsics, and three counted lists of cameras, points and markers.
    """
    raw = (DATA_DIR / name).read_bytes()
    if raw[:2] != b"vP":
        raise ValueError(f"{name}: expected little endian and pixels, got {raw[:2]!r}")
    at = 2
    intrinsics = np.frombuffer(raw, "<f4", 8, at)
    at += 32

    def records(*fields: tuple[Any, ...]) -> Any:
        nonlocal at
        count = int(np.frombuffer(raw, "<i4", 1, at)[0])
        kind = np.dtype(list(fields))
        found = np.frombuffer(raw, kind, count, at + 4)
        at += 4 + count * kind.itemsize
        return found

    cameras = records(("image", "<i4"), ("R", "<f4", 9), ("t", "<f4", 3))
    points = records(("track", "<i4"), ("X", "<f4", 3))
    markers = records(("image", "<i4"), ("track", "<i4"), ("xy", "<f4", 2))
    image = {v: i for i, v in enumerate(cameras["image"].tolist())}
    track = {v: i for i, v in enumerate(points["track"].tolist())}
    return Scene(
        intrinsics=tuple(intrinsics.tolist()),
        turn=cameras["R"].reshape(-1, 3, 3).transpose(0, 2, 1).astype(float),  # by column
        shift=cameras["t"].astype(float),
        points=points["X"].astype(float),
        camera=np.array([image[i] for i in markers["image"].tolist()]),
        point=np.array([track[i] for i in markers["track"].tolist()]),
        xy=markers["xy"].astype(float),
    )
