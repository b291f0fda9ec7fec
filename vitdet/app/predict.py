"""`vitdet predict IMG... --weights FILE`: objects in images, folders and videos, drawn and listed.

What cannot be read, drawn or written is told and left out, and the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch

from vitdet.app.options import load_predictor
from vitdet.predict.predictor import (
    VIDEO_SUFFIXES,
    Predictor,
    find_files,
    passed_over_text,
    video_frames,
)
from vitdet.predict.results import Picture, Result, class_indexes, found_text, split_names
from vitdet.utils.checks import InputError, one_line
from vitdet.utils.files import RESULT_MARKER, replacing, write_text

_FRAMES_A_SECOND = 25.0  # of a video that does not tell
_OF_ONE_INPUT = (InputError, MemoryError, torch.OutOfMemoryError)  # errors; the others go on
_RESULT_SUFFIXES = frozenset({".jpg", ".png", ".mp4", ".json", ".jsonl"})
_LONGEST_NAME = 200  # bytes, of 255 that file systems take: a number and a suffix are added


def run(args: argparse.Namespace) -> int:
    """Predict; return 0, 1 when some of the inputs failed, 2 when all did.

    Raises:
        InputError: a wrong option.
    """
    bad: list[str] = []
    found: dict[str, Path] = {}  # each once
    passed_over: Counter[str] = Counter()
    for word in args.inputs:
        with _going_on(word, bad):
            more, others = find_files(word)
            found |= {_absolute(path): path for path in more}
            passed_over += others
    if passed_over:
        print(passed_over_text(passed_over))
    files = list(found.values())
    outputs = output_names(files, args.out)
    done = left_out = 0
    if files:
        options = {"threshold": args.threshold, "boxes_only": args.boxes_only}
        predictor = load_predictor(args, precision=args.precision, **options)
        names = [n for text in args.classes for n in split_names(text, predictor.class_names)]
        class_indexes(names, predictor.class_names)  # an unknown name is told
        predictor.classes = tuple(names) or None
        note_names(args.out, outputs)
        # where none was found, the predictor has said so
        print(f"threshold {predictor.threshold.text()}\n" * predictor.threshold.found, end="")
        images = [path for path in files if path.suffix.lower() not in VIDEO_SUFFIXES]
        try:
            for path, result, seconds in _results(predictor, images, bad):
                with _going_on(path, bad):
                    _write(result, outputs[path], args)
                    text = found_text(result.counts(), result.best)
                    print(_line(path, result.size, text, f"{seconds:.2f} s"), flush=True)
                    done, left_out = done + 1, left_out + result.left_out
            for path in sorted(set(files) - set(images)):
                with _going_on(path, bad):
                    line, others = _video(predictor, path, outputs[path], args)
                    print(line, flush=True)
                    done, left_out = done + 1, left_out + others
        except (KeyboardInterrupt, OSError):  # `cli.main` says which
            print(f"{done} of {len(files)} inputs are done, see {args.out}", file=sys.stderr)
            raise
    if done and args.classes:
        print(f"left out: {left_out} detections of other classes (--classes)")
    if done and not args.no_pictures:
        print(f"pictures in {args.out}")
    if bad and done + len(bad) > 1:
        print(f"{len(bad)} of {done + len(bad)} inputs failed", file=sys.stderr)
    return 0 if not bad else 1 if done else 2


def _absolute(path: Path) -> str:
    return os.path.abspath(path)  # noqa: PTH100 (keeps links)


@contextmanager
def _going_on(name: object, bad: list[str]) -> Iterator[None]:
    """Print what is wrong with one input, note its name, and go on."""
    try:
        yield
    except _OF_ONE_INPUT as error:
        text = str(error) if isinstance(error, InputError) else f"{name}: not enough memory"
        print(f"error: {one_line(text)}", file=sys.stderr, flush=True)
        bad.append(str(name))


def output_names(files: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Return the path of each file's results, without their suffix: its name, or name-2 and so on.

    A name is free when nothing in the folder has it, in capitals or not, or when it was this
    file's in an earlier run.

    Raises:
        InputError: the folder has inputs in it, or a list of earlier results that is none.
    """
    for parent in {path.parent for path in files}:
        if folder.exists() and parent.exists() and folder.samefile(parent):
            raise InputError(f"--out {folder}: inputs are in this folder. Choose another one.")
    earlier = _earlier(folder)
    mine = {path: name for name, path in earlier.items()}
    taken = {_folded(name) for name in earlier}
    if folder.is_dir():
        taken |= {_folded(p.stem) for p in folder.iterdir() if p.suffix in _RESULT_SUFFIXES}
    outputs = {}
    for path in files:
        stem = os.fsencode(path.stem)[:_LONGEST_NAME].decode(errors="ignore") or "image"
        name, number = mine.get(_absolute(path), stem), 1
        while _folded(name) in taken and _absolute(path) not in mine:
            number += 1
            name = f"{stem}-{number}"
        taken.add(_folded(name))
        outputs[path] = folder / name
    return outputs


def _folded(name: str) -> str:
    """What file systems may take for the same name is the same."""
    return unicodedata.normalize("NFC", name).casefold()


def _earlier(folder: Path) -> dict[str, str]:
    """Return the names of results in a folder and the paths of their inputs."""
    marker = folder / RESULT_MARKER
    try:
        content = json.loads(marker.read_text(encoding="utf-8")) if marker.exists() else {}
    except ValueError:
        content = None
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        raise InputError(f"{marker}: not a list of results. Remove it, or choose another --out.")
    return content


def note_names(folder: Path, outputs: dict[Path, Path]) -> None:
    """Make the folder and write into it which result is whose."""
    folder.mkdir(parents=True, exist_ok=True)
    inputs = {output.name: _absolute(path) for path, output in outputs.items()}
    write_text(folder / RESULT_MARKER, json.dumps(_earlier(folder) | inputs, indent=1) + "\n")


def _results(
    predictor: Predictor, paths: Sequence[Path], bad: list[str]
) -> Iterator[tuple[Path, Result, float]]:
    """Yield each image that can be read, what is in it, and its share of the time."""
    for first in range(0, len(paths), predictor.batch_size):
        started = time.perf_counter()
        batch: list[Picture] = []
        for path in paths[first : first + predictor.batch_size]:
            with _going_on(path, bad):
                batch.append(Picture(str(path), path, Picture(str(path), path).pixels()))
        found = predict_batch(predictor, batch, bad)
        seconds = (time.perf_counter() - started) / max(1, len(batch))
        for result in found:
            yield Path(result.name), result, seconds


def predict_batch(predictor: Predictor, batch: Sequence[Picture], bad: list[str]) -> list[Result]:
    """Predict on a batch; if that fails, one by one, so that only the image that fails is lost."""
    if len(batch) == 1:
        with _going_on(batch[0].name, bad):
            return predictor(list(batch))
        return []
    try:
        return predictor(list(batch))
    except _OF_ONE_INPUT:
        return [result for each in batch for result in predict_batch(predictor, [each], bad)]


def _write(result: Result, output: Path, args: argparse.Namespace) -> None:
    if args.save_json:
        write_text(output.with_name(f"{output.name}.json"), result.to_json() + "\n")
    if not args.no_pictures:
        png = result.name.lower().endswith(".png")
        result.save(output.with_name(f"{output.name}.{'png' if png else 'jpg'}"))


def _line(path: Path, size: tuple[int, int], found: str, took: str) -> str:
    return f"{one_line(str(path))}  {size[0]} x {size[1]}  {one_line(found)}  ({took})"


def _video(
    predictor: Predictor, path: Path, output: Path, args: argparse.Namespace
) -> tuple[str, int]:
    """Predict on a video frame by frame; return the line about it, and how many are left out."""
    started = time.perf_counter()
    counts: Counter[str] = Counter()
    size, frames, left_out, best = (0, 0), 0, 0, None
    with ExitStack() as stack:
        sinks: list[Callable[[Result], object]] = []
        if not args.no_pictures:
            rate = _property(path, cv2.CAP_PROP_FPS) or _FRAMES_A_SECOND
            sinks.append(stack.enter_context(_clip(output.with_name(f"{output.name}.mp4"), rate)))
        if args.save_json:
            partial = stack.enter_context(replacing(output.with_name(f"{output.name}.jsonl")))
            lines = stack.enter_context(partial.open("w", encoding="utf-8"))
            sinks.append(lambda result: lines.write(result.to_json() + "\n"))
        for result in predictor(video_frames(path)):
            for sink in sinks:
                sink(result)
            counts.update(result.counts())
            size, frames = result.size, frames + 1
            left_out += result.left_out
            best = max(filter(None, (best, result.best)), key=lambda each: each[1], default=None)
    took = f"{frames} frames, {time.perf_counter() - started:.1f} s"
    return _line(path, size, found_text(dict(counts.most_common()), best), took), left_out


def _property(path: Path, name: int) -> float:
    video = cv2.VideoCapture(str(path))
    try:
        return video.get(name)
    finally:
        video.release()


@contextmanager
def _clip(path: Path, rate: float) -> Iterator[Callable[[Result], None]]:
    """Give a function that adds a drawn frame to a video, which appears whole or not at all."""
    partial = path.with_name(f".{os.getpid()}.{path.name}")  # OpenCV goes by the suffix
    writers: list[cv2.VideoWriter] = []
    frames = 0

    def add(result: Result) -> None:
        nonlocal frames
        image = result.plot(min_side=1)
        if not writers:
            code = cv2.VideoWriter.fourcc(*"mp4v")
            writers.append(cv2.VideoWriter(str(partial), code, rate, image.shape[1::-1]))
        writers[0].write(np.ascontiguousarray(image[..., ::-1]))
        frames += 1

    try:
        yield add
        for writer in writers:
            writer.release()
        if _property(partial, cv2.CAP_PROP_FRAME_COUNT) != frames:  # OpenCV says nothing of it
            text = f"output {path}: OpenCV did not write all frames. Check the folder and the disk"
            raise InputError(f"{text}, or use --no-pictures --save-json.")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
