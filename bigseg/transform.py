"""Any function from Dask array to Dask array, applied to what a volume holds where it is needed.

    # my.py
    def subtract_background(image):                            # (c, t, z, y, x) in and out
        image = image.astype("float32")
        smooth = partial(gaussian_filter, sigma=(0, 0, 0, 8, 8), truncate=3)
        return image - image.map_overlap(smooth, depth=(0, 0, 0, 24, 24), boundary="reflect")

    subtract_background.depth = (0, 24, 24)    # context along z, y, x in voxels, or one number

The function is evaluated in the worker, for each region that is read. Along one axis, for a region
in the middle of the volume and one at its end:

    volume       |0···················································N|
    wanted               |=============|              |================|
    evaluated      |depth|=============|depth|  |depth|================|

It is clipped at the volume, so that the function meets the true border and treats it by its own
rule. For every function whose value at a voxel depends only on voxels within `depth` of it, this
equals transforming the whole volume first. Without `depth` it is a function of single voxels. It
never looks from one time point to another, and changes the type and the channels only.

The image that it gets has one chunk, whatever the volume's are. The file must stand by itself:
workers are given its text, never its path, and its hash stands for all that it does.

Nothing here executes what a plan says. A plan holds the hash only; the text comes from the file
that the user names in the command, each time.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import operator
import sys
import traceback
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg.blocks import Region, Vec
from bigseg.errors import InputError, UsageError
from bigseg.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from bigseg.volume import Volume

MAX_SOURCE_BYTES = 1 << 20
# The sample on which a function is tried, and how much more context it is then given.
SAMPLE_VOX = 8
# How far a value may move with more context, of the range of values; filters leave out tails.
TOLERANCE = 1e-3


class TransformPlan(Settings):
    """What the plan knows of a transform; `depth` is (t, z, y, x), `sha256` that of its file."""

    name: str
    depth: Vec
    sha256: str
    dtype: str
    n_channels: int


@dataclass(frozen=True)
class Transform:
    """A function of the user's, with the text of the file that defines it; pickles as that text.

    `depth` is along t, z, y, x. `file` is the name of the file in messages.
    """

    name: str
    source_text: str = field(repr=False)
    file: str
    depth: Vec
    function: Callable[[Any], Any] = field(compare=False, repr=False)

    @classmethod
    def from_source(cls, text: str, name: str, *, file: str = "transform.py") -> Transform:
        """The function `name` of a file with this text, which is executed once in a process.

        Raises:
            UsageError: the text is no Python, raises, or has no such function; or its depth is
                not one or three integers from 0 on.
        """
        module = _execute(text, file)
        function = getattr(module, name, None)
        if not callable(function):
            raise UsageError(_no_function(module, name, file))
        return cls(name, text, file, _depth_of(function, name, file), function)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(Transform.from_source, file=self.file), (
            self.source_text,
            self.name,
        )

    @property
    def sha256(self) -> str:
        """The hash of the bytes of the file."""
        return _sha256(self.source_text)

    def apply(self, data: NDArray[Any]) -> NDArray[Any]:
        """What the function makes of (c, t, z, y, x): other channels and type, the same voxels.

        Raises:
            UsageError: it raises, or gives something else than an array of real numbers (c, t, z,
                y, x) with the same t, z, y, x.
        """
        import dask.array as da  # half a second that commands without a transform save

        try:
            result = self.function(da.from_array(data, chunks=data.shape, name=False))
            if isinstance(result, da.Array):
                # Threads belong to the engine and to the readers.
                result = result.compute(scheduler="synchronous")
        except Exception as error:  # whatever the user's function raises is a message to the user
            raise UsageError(
                f"{self.name} of {self.file} raises {_where(error, self.file)} for an image "
                f"(c, t, z, y, x) of shape {data.shape} and type {data.dtype}: correct it"
            ) from error
        return self._checked(result, data)

    def _checked(self, result: object, data: NDArray[Any]) -> NDArray[Any]:
        if not isinstance(result, np.ndarray):
            raise UsageError(
                f"{self.name} of {self.file} gives a {type(result).__name__}, where a Dask array "
                "(c, t, z, y, x) is needed: return that"
            )
        if result.ndim != 5 or result.shape[1:] != data.shape[1:] or not result.shape[0]:
            raise UsageError(
                f"{self.name} of {self.file} makes {result.shape} of an image (c, t, z, y, x) of "
                f"shape {data.shape}: it may change the number of channels only"
            )
        if result.dtype.kind not in "biuf" or result.dtype.itemsize > 8:
            raise UsageError(
                f"{self.name} of {self.file} gives values of type {result.dtype}, where booleans, "
                "integers or floating-point numbers up to 64 bits are needed: convert them in it"
            )
        return result.astype(result.dtype.newbyteorder("="), copy=False)


class TransformedVolume:
    """A level of an image as a transform leaves it; reads like a `Volume`, and writes nothing.

    `reader` gives the voxels (c, t, z, y, x) of the chosen channels for a region inside the
    volume, and may be called by several threads. Channels are those of the result, from 0 on.
    There are no coarser levels: a transform of those would be something else.

    Raises:
        UsageError: the transform is not the one that was planned with.
    """

    def __init__(
        self,
        reader: Callable[[Region], NDArray[Any]],
        source: Volume,
        channels: Sequence[int],
        transform: Transform,
        plan: TransformPlan,
    ) -> None:
        if (transform.name, transform.sha256) != (plan.name, plan.sha256):
            raise UsageError(
                f"{transform.name} of {transform.file} is not what was planned with ({plan.name}, "
                f"a file with hash {plan.sha256[:12]}): bring that back, or begin anew with "
                "--overwrite"
            )
        self._reader = reader
        self._transform = transform
        self._plan = plan
        self.url = source.url
        self.level = source.level
        self.n_levels = source.level + 1
        self.shape = source.shape
        self.scale = source.scale
        self.chunk_shape = source.chunk_shape
        self.write_unit = source.write_unit
        self.dtype = np.dtype(plan.dtype)
        self.n_channels = plan.n_channels
        names = tuple(source.channel_names[c] for c in channels)
        same = len(names) == plan.n_channels
        self.channel_names = names if same else tuple(map(str, range(plan.n_channels)))

    def at(self, level: int) -> TransformedVolume:
        """This level itself.

        Raises:
            InputError: another level is asked for.
        """
        if level != self.level:
            raise InputError(
                f"level {level} of {self.url} is not transformed, only level {self.level} is: "
                "use that"
            )
        return self

    def read(self, region: Region, channels: Sequence[int] = (0,)) -> NDArray[Any]:
        """The transformed voxels of `region` (t, z, y, x) inside the volume: (c, t, z, y, x).

        Raises:
            UsageError: the region or a channel lies outside, or the transform fails.
        """
        self._check(region, channels)
        if not region.n_voxels:
            return np.empty((len(channels), *region.shape), self.dtype)
        grown = _evaluated(region, self._plan.depth, self.shape)
        result = self._transform.apply(self._reader(grown))
        if (len(result), result.dtype) != (self.n_channels, self.dtype):
            raise UsageError(
                f"{self._plan.name} gives {len(result)} channels of {result.dtype} for {region}, "
                f"elsewhere {self.n_channels} of {self.dtype}: give the same everywhere"
            )
        inside = region.relative_to(grown.start).slices
        return np.take(result[(slice(None), *inside)], list(channels), axis=0)

    def _check(self, region: Region, channels: Sequence[int]) -> None:
        if region.intersect(Region.of_shape(self.shape)) != region:
            raise UsageError(
                f"region {region} is not inside {self.url}, whose shape (t, z, y, x) is "
                f"{self.shape}: give a region inside it"
            )
        if not channels or not all(0 <= c < self.n_channels for c in channels):
            raise UsageError(
                f"channels {tuple(channels)} are not all among the {self.n_channels} that "
                f"{self._plan.name} gives: choose from 0 to {self.n_channels - 1}"
            )


def load_transform(location: str) -> Transform:
    """The function that `FILE.py:FUNCTION` names; executes the file.

    Raises:
        UsageError: there is no such file or function, the file is no Python or raises, or the
            function's depth is not one or three integers from 0 on.
    """
    path, _, name = location.rpartition(":")
    if not path or not name.isidentifier():
        raise UsageError(
            f"--transform {location!r} does not name a function in a file: write FILE.py:FUNCTION"
        )
    return Transform.from_source(_read_source(Path(path)), name, file=Path(path).name)


def describe(transform: Transform, source: Volume, channels: Sequence[int]) -> TransformPlan:
    """What the transform makes of the volume, tried on a few voxels in the middle of it.

    Raises:
        UsageError: it fails or gives what it may not; or its values there depend on voxels
            farther away than its depth, so that the result would depend on the blocks.
    """
    size = (1, SAMPLE_VOX, SAMPLE_VOX, SAMPLE_VOX)
    start = tuple(max(0, (n - k) // 2) for n, k in zip(source.shape, size, strict=True))
    stop = tuple(min(n, a + k) for n, a, k in zip(source.shape, start, size, strict=True))
    sample = Region(start, stop)
    near = _sampled(transform, source, channels, sample, transform.depth)
    farther = (1, *(d + SAMPLE_VOX for d in transform.depth[1:]))
    _check_depth(transform, near, _sampled(transform, source, channels, sample, farther))
    return TransformPlan(
        name=transform.name,
        depth=transform.depth,
        sha256=transform.sha256,
        dtype=str(near.dtype),
        n_channels=len(near),
    )


def _evaluated(region: Region, depth: Vec, shape: Vec) -> Region:
    return region.grow(depth, depth).intersect(Region.of_shape(shape))


def _sampled(
    transform: Transform, source: Volume, channels: Sequence[int], sample: Region, depth: Vec
) -> NDArray[Any]:
    grown = _evaluated(sample, depth, source.shape)
    result = transform.apply(source.read(grown, channels))
    return result[(slice(None), *sample.relative_to(grown.start).slices)]


def _check_depth(transform: Transform, near: NDArray[Any], far: NDArray[Any]) -> None:
    """Refuse what more context changes by more than rounding and the tails of filters."""
    if near.dtype == far.dtype and near.shape == far.shape:
        values, others = near.astype(np.float64), far.astype(np.float64)
        finite = np.isfinite(values) & np.isfinite(others)
        spread = float(np.ptp(others[finite])) if finite.any() else 0.0
        least = 1.0 if near.dtype.kind in "iu" else 0.0
        allowed = max(least, TOLERANCE * spread)
        close = np.isclose(values, others, rtol=1e-5, atol=allowed, equal_nan=True)
        if close.all():
            return
    depth = ", ".join(map(str, transform.depth[1:]))
    raise UsageError(
        f"{transform.name} of {transform.file} gives other values, channels or types where it "
        f"sees more than its depth of {depth} voxels (z, y, x) around them, so that the result "
        f"would depend on the blocks: set {transform.name}.depth to the context that it needs, "
        "and use no statistics of the image in it"
    )


def _read_source(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_SOURCE_BYTES:
            raise UsageError(
                f"--transform {path} has more than the {MAX_SOURCE_BYTES} bytes allowed: give a "
                "smaller file"
            )
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(
            f"--transform {path} cannot be read: {error.strerror or error}; check the path"
        ) from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--transform {path} is no Python file in UTF-8 ({error.reason} at byte "
            f"{error.start}): give a file that is"
        ) from None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _execute(text: str, file: str) -> types.ModuleType:
    """The module that the text makes; the same one when it is asked for again in this process."""
    name = f"bigseg_transform_{_sha256(text)}"
    if name in sys.modules:
        return sys.modules[name]
    module = types.ModuleType(name)
    module.__file__ = file
    # Dataclasses and pickles look for the module of what they meet by its name.
    sys.modules[name] = module
    try:
        # Bytes: Python then takes a byte order mark and a coding line as it does in a file.
        code = compile(text.encode("utf-8"), file, "exec", dont_inherit=True)
        exec(code, module.__dict__)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception | SystemExit):
            raise UsageError(
                f"--transform {file} raises {_where(error, file)}: correct the file"
            ) from error
        raise
    return module


def _where(error: BaseException, file: str) -> str:
    """For a message: type and text of the error, and the last line of the file on its way."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines.append(error.lineno)
    text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())[:300]
    line = f" in line {lines[-1]}" if lines else ""
    return f"{type(error).__name__}{line} ({text})" if text else f"{type(error).__name__}{line}"


def _no_function(module: types.ModuleType, name: str, file: str) -> str:
    here = [
        key
        for key, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
    near = difflib.get_close_matches(name, here, n=3)
    if near:
        return f"{file} has no function {name!r}; did you mean {' or '.join(map(repr, near))}?"
    there = f"it has {', '.join(sorted(here)[:10])}: choose one" if here else "it has none: add one"
    return f"{file} has no function {name!r}; {there}"


def _depth_of(function: Callable[[Any], Any], name: str, file: str) -> Vec:
    """The depth along t, z, y, x; an integer is the same along z, y and x."""
    given = getattr(function, "depth", 0)
    try:
        sides = tuple(given) if isinstance(given, tuple | list) else (given,) * 3
        depth = tuple(operator.index(side) for side in sides)
    except TypeError:
        depth = ()
    if len(depth) != 3 or min(depth) < 0:
        raise UsageError(
            f"{name}.depth of {file} is {given!r}, and must be voxels along z, y, x from 0 on: "
            f"write {name}.depth = (0, 25, 25), or one integer for all three"
        )
    return (0, *depth)
