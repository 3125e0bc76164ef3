"""Training that can be interrupted and resumed to the same bits, and that stops early."""

from __future__ import annotations

import argparse
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from fusedrnn import checkpoint, npz
from fusedrnn.autograd import Variable
from fusedrnn.dataloaders import DataLoader
from fusedrnn.models import Model
from fusedrnn.optimizers import Optimizer
from fusedrnn.programs import common
from fusedrnn.terminal import Report


class Result(NamedTuple):
    """What a program returns."""

    losses: list[float]  # of every epoch
    seconds: float  # of training
    scores: dict[str, dict[str, float]]  # the network's first, then what a trivial answer scores
    model: Model


class Training:
    """Epochs of updates. Checkpoints are written in between, and on Ctrl-C.

    Args:
        step: Takes a batch of the loader, and returns its loss.
        loader: Without one an epoch is one step, which takes nothing.
        settings: What a checkpoint must have been saved with to be taken up, such as the seed.
        steps: What an epoch's sum of losses is divided by; None: the number of batches.
        every: Seconds between checkpoints; None: 30.
        validate: Gives the loss on the validation part after each epoch. Then ``keep_best`` goes back to the
            weights for which it was least.
        patience: Stop after so many epochs without a lower validation loss.
        watch: Other figures to note after each epoch, by name, such as the loss on data of another kind.
    """

    def __init__(
        self,
        model: Model,
        optimizer: Optimizer,
        step: Callable[..., Variable],
        loader: DataLoader | None = None,
        *,
        settings: dict[str, Any] | None = None,
        steps: int | None = None,
        path: npz.PathLike | None = None,
        every: float | None = None,
        validate: Callable[[], float] | None = None,
        patience: int | None = None,
        watch: Mapping[str, Callable[[], float]] | None = None,
    ) -> None:
        self.model, self.step, self.loader, self.settings = model, step, loader, settings or {}
        self.optimizer = optimizer.setup(model)
        self.steps = steps or (loader.max_iter if loader else 1)
        self.path = Path(path) if path else None
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self.every, self.validate, self.patience = every, validate, patience
        self.losses: list[float] = []
        self.validation: list[float] = []
        self.watch = watch or {}
        self.watched: dict[str, list[float]] = {name: [] for name in self.watch}
        self.best: dict[str, Any] = {}  # arrays, by name
        self.total = 0.0  # of the epoch under way
        self.seconds = 0.0  # of this process

    def save(self) -> None:
        self.saved = time.monotonic()
        checkpoint.save(
            self.path or "",
            self.model,
            self.optimizer,
            self.loader,
            settings=self.settings,
            losses=self.losses,
            validation=self.validation,
            watched=self.watched,
            total=self.total,
            **{f"best/{name}": array for name, array in self.best.items()},
        )

    def resume(self) -> None:
        """Take up the checkpoint.

        Raises:
            CheckpointError: It is damaged, of another model or of other settings.
        """
        progress = checkpoint.load(self.path or "", self.model, self.optimizer, self.loader)
        saved = progress.get("settings", {})
        for name, value in self.settings.items():
            if saved.get(name) != value:
                raise checkpoint.CheckpointError(
                    f"{self.path}: saved with {name} {saved.get(name)}, expected {value}"
                )
        self.losses, self.validation, self.total = (progress[k] for k in ("losses", "validation", "total"))
        self.watched |= progress.get("watched", {})
        self.best = {k.removeprefix("best/"): v for k, v in progress.items() if k.startswith("best/")}

    @property
    def stopped(self) -> bool:
        """Whether the validation loss has not become lower for too long."""
        waited = len(self.validation) - 1 - int(np.argmin(self.validation)) if self.validation else 0
        return self.patience is not None and waited >= self.patience

    def keep_best(self) -> None:
        """Go back to the best weights by the validation loss."""
        if self.best:
            self.model.assign_weights({k: v.copy() for k, v in self.best.items()}, "the best weights")

    def run(self, epochs: int, after_epoch: Callable[[float], None] = lambda loss: None) -> None:
        """Go on until there are ``epochs`` epochs, or it stops early.

        Raises:
            KeyboardInterrupt: Ctrl-C, after the step under way; it says where the checkpoint is.
            FloatingPointError: A loss or a gradient is not finite. The weights and the checkpoint are those
                of the step before.
        """
        start = self.saved = time.monotonic()
        with noted_interrupts() as interrupts, np.errstate(all="ignore"):
            try:
                self._epochs(epochs, after_epoch, interrupts)
            except FloatingPointError as error:
                there = self.path is not None and self.path.exists()
                kept = f"the last checkpoint is {self.path}" if there else "there is no checkpoint"
                raise FloatingPointError(f"after epoch {len(self.losses)}: {error}; {kept}") from error
            self.seconds += time.monotonic() - start
            if self.path:
                self.save()
        if interrupts:  # the first came while the last checkpoint was written
            raise KeyboardInterrupt(f"after epoch {len(self.losses)}")

    def _epochs(self, epochs: int, after_epoch: Callable[[float], None], interrupts: list[int]) -> None:
        while len(self.losses) < epochs and not self.stopped:
            if self.loader is None or self.loader.iteration == 0:
                self.model.reset_state()
                self.total = 0.0
            for batch in self.loader or [()]:
                loss = self.step(*batch)
                value = _finite("loss", loss.data)
                self.model.cleargrads()
                loss.backward()
                loss.unchain_backward()
                self.optimizer.update()
                self.total += value
                if self.loader is not None:
                    self._pause(interrupts)
            self.losses.append(self.total / self.steps)
            if self.validate is not None:
                self.validation.append(_finite("validation loss", self.validate()))
                if np.argmin(self.validation) == len(self.validation) - 1:
                    self.best = {name: np.array(p) for name, p in self.model.named_params()}
            for name, figure in self.watch.items():
                self.watched[name].append(figure())
            after_epoch(self.losses[-1])
            self._pause(interrupts)

    def _pause(self, interrupts: list[int]) -> None:
        """Between two steps: save where it is time to, break off where Ctrl-C was pressed."""
        every = 30 if self.every is None else self.every
        if self.path and (interrupts or time.monotonic() - self.saved >= every):
            self.save()
        if interrupts:
            kept = f"saved in {self.path}, --resume goes on"
            where = kept if self.path else "nothing is kept without --checkpoint FILE"
            raise KeyboardInterrupt(f"after epoch {len(self.losses)}: {where}")


def _finite(what: str, value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise FloatingPointError(f"expected a finite {what}, got {number}")
    return number


@contextmanager
def noted_interrupts() -> Iterator[list[int]]:
    """Within the block the first Ctrl-C only adds to the list; the second interrupts as usual."""
    noted: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def add_arguments(parser: argparse.ArgumentParser, epochs: int | str, *, cell: bool = False) -> None:
    """The options of a program that trains for a while; a text for ``epochs`` says what None stands for."""
    parser.add_argument(
        "--epochs",
        type=common.at_least(0),
        default=epochs if isinstance(epochs, int) else None,
        metavar="N",
        help=f"how many in all; 0 trains nothing (default: {epochs})",
    )
    common.add_arguments(parser, cell=cell)
    parser.add_argument(
        "--checkpoint",
        type=common.output_file,
        metavar="FILE",
        help="where checkpoints go (default: none are made)",
    )
    parser.add_argument(
        "--every",
        type=common.at_least(0, kind=float),
        metavar="SECONDS",
        help="between checkpoints (default: 30)",
    )
    parser.add_argument("--resume", action="store_true", help="continue from --checkpoint, if it exists")


def refuse(path: Path | None) -> NoReturn:
    """Raise the error that a checkpoint is there and was not asked for."""
    raise ValueError(f"{path} exists: --resume continues from it; else remove it or name another file")


def go(training: Training, epochs: int, resume: bool, report: Report, what: str) -> None:
    """Run it, from its checkpoint where that is wanted and there, with a progress bar."""
    if training.path is None and (resume or training.every is not None):
        raise ValueError(f"--{'resume' if resume else 'every'} needs --checkpoint FILE")
    there = training.path is not None and training.path.exists()
    if there and not resume:
        refuse(training.path)
    if there:
        training.resume()
        report.line(f"resumed from {training.path}, epoch {len(training.losses)}")
    elif resume:
        report.line(f"there is no {training.path} yet: starting from the beginning")

    def note(loss: float) -> None:
        found = f", validation {training.validation[-1]:.4g}" if training.validation else ""
        progress.advance(f"mean loss {loss:.4g}{found}")

    before = len(training.losses)
    with report.progress(epochs, what, before) as progress:
        training.run(epochs, note)
    if count := len(training.losses) - before:
        report.line(f"{training.seconds / count:.3f} s an epoch")
    if training.stopped:
        report.line(f"stopped early after epoch {len(training.losses)}")
