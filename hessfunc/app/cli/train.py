"""Command ``hessfunc train``, which trains a small network."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer
from rich.console import Console

from hessfunc.app.cli.methods import OF_ABSA, OF_NEWTON, OF_SGD, epochs_of, optimiser, schedule
from hessfunc.app.cli.options import (
    Arch,
    DataPath,
    Depth,
    Device,
    Traceback,
    Training,
    command_line,
    fail,
    held,
    in_one_line,
    make_folder,
    named_net,
    place,
    refuse_data,
    refuse_other_files,
    refuse_seed,
)
from hessfunc.app.cli.progress import bar, bars, finished_fraction, line, print_table
from hessfunc.app.cli.ranks import refuse_several
from hessfunc.app.cli.training_options import (
    AdversarialShare,
    Alpha,
    BatchSize,
    CgAtol,
    CgMax,
    CgRtol,
    CurvatureName,
    Epochs,
    Eps,
    ExampleCount,
    LargeRatio,
    Lr,
    LrDecay,
    LrDecayEpoch,
    MaxBlocks,
    MethodName,
    Momentum,
    OptimizerName,
    OutFolder,
    Patience,
    SaveEvery,
    SeedNumber,
    SolverName,
    TimeLimit,
    Tracked,
    WeightDecay,
)

if TYPE_CHECKING:
    from hessfunc.app import report
    from hessfunc.training.history import Run
    from hessfunc.training.runs import Track


def train(
    context: typer.Context,
    data: Training = "digits",
    arch: Arch = None,
    depth: Depth = None,
    method: MethodName = "sgd",
    optimizer: OptimizerName = None,
    curvature: CurvatureName = None,
    epochs: Epochs = 90,
    batch_size: BatchSize = 128,
    large_ratio: LargeRatio = None,
    lr: Lr = 0.1,
    lr_decay: LrDecay = 0.2,
    lr_decay_epoch: LrDecayEpoch = "30,60",
    adversarial_share: AdversarialShare = None,
    eps: Eps = None,
    patience: Patience = None,
    momentum: Momentum = None,
    weight_decay: WeightDecay = None,
    alpha: Alpha = None,
    solve: SolverName = None,
    cg_max: CgMax = None,
    cg_rtol: CgRtol = None,
    cg_atol: CgAtol = None,
    max_blocks: MaxBlocks = None,
    examples: ExampleCount = None,
    data_path: DataPath = None,
    track: Tracked = None,
    minutes: TimeLimit = None,
    device: Device = None,
    seed: SeedNumber = 0,
    out: OutFolder = Path("hessfunc-train"),
    save_every: SaveEvery = 100,
    traceback: Traceback = False,
) -> None:
    """Train a small network with SGD or Newton's method, on batches of fixed or growing size.

    Prints loss and accuracy after each epoch, and writes report.html for the browser, history.json
    and history.png. These show all quantities against epochs and against gradient-equivalents, the
    work in units of one gradient. With --track or --method absa they include the dominant
    eigenvalue, batch size and learning rate. The state is saved in checkpoint.pt: after an
    interruption or a kill, the same command resumes from it and ends with the same bits.
    """
    from hessfunc.app.report import Invocation
    from hessfunc.app.table import summary

    began = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    folder = _Folder(out, Invocation(command_line(context), seed, began), batch_size)
    # The folder stays locked until an interrupted training is written, too.
    with ExitStack() as lock:
        try:
            trained = _trained(context.params, context.args, folder, lock)
        except KeyboardInterrupt:
            folder.finish_interrupted()
            fail(f"interrupted; the finished epochs are in {out}", code=130)
        except Exception as error:
            if traceback:
                raise
            fail(in_one_line(error))

    console = Console(markup=False, emoji=False)
    print_table(console, summary(trained, batch_size=batch_size))
    console.print(f"report.html, history.json, history.png and checkpoint.pt are in {out}")
    if trained.ended not in ("complete", "time is up"):
        fail(trained.ended)


@dataclass
class _Folder:
    """Folder of the results of a training.

    Attributes:
        path: Path of the folder.
        started: Command, seed and time of the run, for the report.
        batch_size: Number of examples in a base batch.
        settings: Settings of the run as plain data, empty until the options are checked.
        running: Run so far; None before its first record.
    """

    path: Path
    started: report.Invocation
    batch_size: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    running: Run | None = None

    def refuse_others(self) -> None:
        """Refuse files that no earlier run with these settings has written."""
        from hessfunc.training.history import read

        if not (self.path / "checkpoint.pt").exists():
            refuse_other_files(self.path, ("history.png", "report.html"), "history.json")
            # `read` raises if the file belongs to other settings or to another program.
            read(self.path / "history.json", self.settings)

    def keep(self, run: Run) -> None:
        """Write the records so far."""
        from hessfunc.training.history import write

        self.running = run
        write(self.path / "history.json", self.settings, [run])

    def finish(self, run: Run) -> None:
        """Write the records, the figure and the report."""
        from hessfunc.app import report
        from hessfunc.files import write_whole
        from hessfunc.plot.trainings import draw

        self.keep(run)
        draw(self.path / "history.png", [run], batch_size=self.batch_size)
        picture = (self.path / "history.png").read_bytes()
        page = report.training(run, self.settings, self.started, picture).encode()
        write_whole(self.path / "report.html", lambda file: file.write(page))

    def finish_interrupted(self) -> None:
        """Write what an interrupted training has finished."""
        if self.running is not None:
            self.finish(replace(self.running, ended="interrupted"))


def _trained(given: Mapping[str, Any], more: list[str], folder: _Folder, lock: ExitStack) -> Run:
    """Check the options, train, and write the results.

    Args:
        given: Values of the options by their names.
        more: Arguments that belong to no option.
        folder: Folder of the results.
        lock: Stack that holds the lock of the folder.
    """
    from hessfunc.app import tasks
    from hessfunc.training.checkpoint import TrainingCheckpoint
    from hessfunc.training.methods import SGD
    from hessfunc.training.runs import run

    refuse_data(given["data"], given["data_path"])
    refuse_several("train")
    refuse_seed(given["seed"])
    if given["track"] not in (None, "top", "full"):
        raise ValueError(f"--track must be top or full, not {given['track']!r}")
    net = named_net(given["arch"], given["depth"])
    decay = epochs_of(given["lr_decay_epoch"], more)
    chosen = optimiser(given["optimizer"], given["lr"], _of(OF_SGD, given), _of(OF_NEWTON, given))
    plan, of_plan = schedule(
        given["method"],
        epochs=given["epochs"],
        large_ratio=given["large_ratio"],
        lr_decay=given["lr_decay"],
        lr_decay_epochs=decay,
        of_absa=_of(OF_ABSA, given),
    )
    device, _ = place(given["device"])
    make_model = tasks.net(given["data"], net)
    seen, held_out = tasks.examples(
        given["data"], path=given["data_path"], count=given["examples"], device=device
    )
    make_folder(folder.path)
    lock.enter_context(held(folder.path))
    path = given["data_path"]
    folder.settings = {
        "data": given["data"],
        "data_path": None if path is None else str(path.resolve()),
        "arch": net,
        "optimizer": type(chosen).__name__,
        **asdict(chosen),
        "method": given["method"],
        **of_plan,
        "epochs": given["epochs"],
        "batch_size": given["batch_size"],
        "examples": len(seen),
        "test": len(held_out),
        "track": given["track"],
        "seed": given["seed"],
    }
    folder.refuse_others()
    kind = "sgd" if isinstance(chosen, SGD) else "newton"
    name = kind if given["method"] == "sgd" else f"{kind}, {given['method']}"
    with bars() as progress:
        tick = bar(progress, f"{net} by {name}")

        def on_record(run: Run) -> None:
            folder.keep(run)
            last = run.records[-1]
            tick(
                finished_fraction(last, given["epochs"], given["minutes"]), f"loss {last.loss:.4g}"
            )
            progress.console.print(line(last), highlight=False, markup=False, soft_wrap=True)

        def on_step(count: int) -> None:
            assert folder.running is not None
            last = folder.running.records[-1]
            done = replace(last, epoch=int(last.epoch) + count / len(seen))
            tick(
                finished_fraction(done, given["epochs"], given["minutes"]), f"loss {last.loss:.4g}"
            )

        checkpoint = folder.path / "checkpoint.pt"
        trained = run(
            name,
            make_model,
            chosen,
            seen,
            held_out,
            epochs=given["epochs"],
            batch_size=given["batch_size"],
            seed=given["seed"],
            minutes=given["minutes"],
            device=device,
            schedule=plan,
            eps=0.005 if given["eps"] is None else given["eps"],
            track=cast("Track", given["track"]),
            checkpoint=TrainingCheckpoint(checkpoint, folder.settings, given["save_every"]),
            callback=on_record,
            on_step=on_step,
        )
    folder.finish(trained)
    return trained


def _of(options: Mapping[str, str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the options of one method, by the names of its settings."""
    return {
        name: given[flag.removeprefix("--").replace("-", "_")] for name, flag in options.items()
    }
