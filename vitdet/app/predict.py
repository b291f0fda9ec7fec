"""`vitdet predict IMG... --weights FILE`: objects in images, folders and videos, drawn and listed.

One line an image. What cannot be read is told and left out, and the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import cv2
import numpy as np

from vitdet.app.options import add_predictor_arguments, load_predictor, make_folder
from vitdet.predict.inputs import Picture, files_of, is_video, video_frames
from vitdet.predict.predictor import Predictor
from vitdet.predict.results import Result
from vitdet.utils.checks import InputError, fail
from vitdet.utils.files import replacing, write_text
from vitdet.utils.precision import PRECISIONS

_FRAMES_A_SECOND = 25.0  # of a video that does not tell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="IMG",
        help='images, folders of images, patterns ("shots/*.jpg"), videos',
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("predictions"),
        metavar="DIR",
        help="folder for the pictures (default %(default)s)",
    )
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="least score (default %(default)s)"
    )
    parser.add_argument("--classes", metavar="A,B", help="only these, by name")
    parser.add_argument(
        "--save-json",
        action="store_true",
        help="write boxes and masks, too: one .json an image, one .jsonl a video",
    )
    parser.add_argument("--no-pictures", action="store_true", help="draw nothing")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="auto: bf16 where the device has it (default)",
    )
    add_predictor_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Predict; return 0, 1 when something could not be read, 2 when nothing could.

    Raises:
        InputError: a wrong option.
    """
    bad: list[str] = []
    files = _files(args.inputs, bad)
    outputs = _outputs(files, args.out)
    classes = [name.strip() for name in args.classes.split(",")] if args.classes else None
    predictor = load_predictor(
        args, precision=args.precision, threshold=args.threshold, classes=classes
    )
    make_folder(args.out)
    done = 0
    for path, result, seconds in _images(predictor, files, bad):
        _write(result, outputs[path], args)
        print(_line(path, result.size, result.counts(), f"{seconds:.2f} s"), flush=True)
        done += 1
    for path in filter(is_video, files):
        with _told(str(path), bad):
            print(_video(predictor, path, outputs[path], args), flush=True)
            done += 1
    if done and not args.no_pictures:
        print(f"pictures in {args.out}")
    if bad:
        print(f"{len(bad)} of {done + len(bad)} inputs could not be read", file=sys.stderr)
    return 0 if not bad else 1 if done else 2


def _files(inputs: Sequence[str], bad: list[str]) -> list[Path]:
    """Return the image and video files that the words mean, each once."""
    found: list[Path] = []
    for word in inputs:
        with _told(word, bad):
            found += files_of(Path(word))
    return list(dict.fromkeys(found))


@contextmanager
def _told(name: str, bad: list[str]) -> Iterator[None]:
    """Print what a user can repair, note the name, and go on."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        bad.append(name)


def _outputs(files: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Return the output of each file, without the suffix for JSON: its name, or name-2 and so on.

    Raises:
        InputError: an output would be one of the inputs.
    """
    inputs = {path.resolve() for path in files}
    taken: Counter[str] = Counter()
    outputs = {}
    for path in files:
        taken[path.stem] += 1
        number = f"-{taken[path.stem]}" if taken[path.stem] > 1 else ""
        suffix = ".mp4" if is_video(path) else ".png" if path.suffix.lower() == ".png" else ".jpg"
        output = folder / f"{path.stem}{number}{suffix}"
        if output.resolve() in inputs:
            remedy = "Choose another --out."
            fail(f"output {output}", expected="a file of its own", got="an input", remedy=remedy)
        outputs[path] = output
    return outputs


def _images(
    predictor: Predictor, files: Sequence[Path], bad: list[str]
) -> Iterator[tuple[Path, Result, float]]:
    """Yield each image that can be read, what is in it, and its share of the time."""
    paths = [path for path in files if not is_video(path)]
    for first in range(0, len(paths), predictor.batch_size):
        started = time.perf_counter()
        batch: dict[Path, Picture] = {}
        for path in paths[first : first + predictor.batch_size]:
            with _told(str(path), bad):
                batch[path] = Picture(str(path), path).loaded()
        results = predictor(list(batch.values()))
        seconds = (time.perf_counter() - started) / max(1, len(batch))
        for path, result in zip(batch, results, strict=True):
            yield path, result, seconds


def _write(result: Result, output: Path, args: argparse.Namespace) -> None:
    if not args.no_pictures:
        result.save(output)
    if args.save_json:
        write_text(output.with_suffix(".json"), result.to_json() + "\n")


def _line(path: Path, size: tuple[int, int], counts: dict[str, int], took: str) -> str:
    found = ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"
    return f"{path}  {size[0]} x {size[1]}  {found}  ({took})"


def _video(predictor: Predictor, path: Path, output: Path, args: argparse.Namespace) -> str:
    """Predict on a video frame by frame and return the line about it."""
    started = time.perf_counter()
    counts: Counter[str] = Counter()
    size, frames = (0, 0), 0
    with ExitStack() as stack:
        sinks: list[Callable[[Result], None]] = []
        if not args.no_pictures:
            sinks.append(stack.enter_context(_clip(output, _rate(path))))
        if args.save_json:
            sinks.append(stack.enter_context(_lines(output.with_suffix(".jsonl"))))
        for result in predictor(video_frames(path)):
            for sink in sinks:
                sink(result)
            counts.update(result.counts())
            size, frames = result.size, frames + 1
    took = f"{frames} frames, {time.perf_counter() - started:.1f} s"
    return _line(path, size, dict(counts.most_common()), took)


def _rate(path: Path) -> float:
    video = cv2.VideoCapture(str(path))
    rate = video.get(cv2.CAP_PROP_FPS)
    video.release()
    return rate if rate > 0 else _FRAMES_A_SECOND


@contextmanager
def _clip(path: Path, rate: float) -> Iterator[Callable[[Result], None]]:
    """Give a function that adds a drawn frame to a video, which appears whole or not at all."""
    partial = path.with_name(f".{os.getpid()}.{path.name}")  # OpenCV goes by the suffix
    writers: list[cv2.VideoWriter] = []

    def add(result: Result) -> None:
        image = result.plot(min_side=1)
        if not writers:
            code = cv2.VideoWriter.fourcc(*"mp4v")
            writers.append(cv2.VideoWriter(str(partial), code, rate, image.shape[1::-1]))
        if not writers[0].isOpened():
            remedy = "Check the folder, or use --no-pictures --save-json."
            fail(f"output {path}", expected="a video that OpenCV writes", got="no", remedy=remedy)
        writers[0].write(np.ascontiguousarray(image[..., ::-1]))

    try:
        yield add
        for writer in writers:
            writer.release()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _lines(path: Path) -> Iterator[Callable[[Result], None]]:
    """Give a function that adds a result as a line of JSON to a file."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:

        def add(result: Result) -> None:
            file.write(json.dumps(result.to_dict()) + "\n")

        yield add
        file.flush()
