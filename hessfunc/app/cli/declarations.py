"""Options of all commands, as one table of declarations.

Values and choices that belong to modules of torch are repeated here, so that ``--help`` and
completion do not wait for torch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import typer

from hessfunc.app.cli.options import DTYPES, one_of, option

DATASETS = ("digits", "mnist", "cifar10")
EXPERIMENTS = ("exp01", "exp02", "exp08", "exp09")
# Names of the parts of an analysis, in order.
PARTS = ("eigenvalues", "smallest", "trace", "density", "line", "plane")
# Curvature matrices of an analysis, and their names in reports.
MATRICES = {
    "hessian": "Hessian",
    "ggn": "generalised Gauss-Newton matrix",
    "fisher": "Fisher matrix",
    "efisher": "empirical Fisher matrix",
}
_RESIDUALS = ("none", "zero", "clip", "abs")
BLOCKS = (
    *(f"hbp-{residual}" for residual in _RESIDUALS),
    *("kfra", "kflr", "kfac", "ekfac"),
    *(f"pch-{residual}" for residual in _RESIDUALS),
    *("ggn", "hessian"),
)

# Options of one panel of a help.
_data_option = partial(option, panel="Data")
_effort = partial(option, panel="Effort")
_of_text = partial(option, panel="Language models")
_sgd, _newton = (
    partial(option, panel="--optimizer sgd"),
    partial(option, panel="--optimizer newton"),
)
_absa = partial(option, panel="--method absa")
_network = partial(option, panel="The network and its batches")
_ranks, _time = partial(option, panel="The ranks"), partial(option, panel="The time")

_LARGEST_SEED = 2**63 - 1
_SEARCHED = "searched in $HESSFUNC_DATA"
_CIFAR10 = "Path to CIFAR-10: the folder cifar-10-batches-py or an .npz file."
_IMAGES = (
    "Path to the data. MNIST: the folder of the four idx files or their .gz. CIFAR-10: the folder "
    "cifar-10-batches-py or an .npz file."
)
_NETS = (
    "Network: c1, c2, mlp, or a ResNet such as resnet20; for digits also convnet, for cifar10 also "
    "chen, c4d3, c3d3."
)
_DEPTHS = "Depth with --arch resnet: 20, 32, 44, 56, 110."
_MATVECS = "matrix-vector products, even if the tolerance is not reached."


def _seed(what: str) -> Any:
    return option("N", f"Seed of {what}.", min=0, max=_LARGEST_SEED)


def _data(default: str = "") -> Any:
    text = "Data set: digits, mnist or cifar10."
    return _data_option("NAME", text, default=default, choices=DATASETS)


_MATRIX: Any = option(
    "NAME",
    "Matrix: hessian, ggn (generalised Gauss-Newton), fisher, or efisher (empirical).",
    choices=tuple(MATRICES),
)
_COMMON: dict[str, Any] = {
    "device": option("NAME", "Device to compute on: cpu, cuda, cuda:1, mps."),
    "out": option("DIR", "Folder of the results."),
    "as_json": option("", "Print the results as JSON, and nothing else.", "--json"),
    "quiet": option("", "Print neither a table nor progress.", "--quiet", "-q"),
    "traceback": option("", "Show the Python traceback of an error.", "--traceback"),
}

_ANALYZE: dict[str, Any] = {
    "target": typer.Argument(
        metavar="TARGET", help="What to analyse: digits, cifar10, hf:PATH or module:function."
    ),
    "curvature": _MATRIX,
    "only": option(
        "NAMES",
        f"Compute only these parts, separated by commas: {', '.join(PARTS)}.",
        default="all",
    ),
    "dtype": option(
        "NAME",
        "Convert parameters and inputs: float32, float64, bfloat16 (bf16) or float16.",
        choices=DTYPES,
    ),
    "seed": _seed("the training and of all random vectors"),
    "k": _effort("N", "Number of top eigenvalues.", default="10, or all if fewer"),
    "probes": _effort("N", "Random vectors of the density."),
    "steps": _effort("N", "Lanczos steps per random vector."),
    "trace_rtol": _effort("X", "Tolerance of the trace: relative half-width of its 95 % interval."),
    "max_matvecs": _effort(
        "N", f"Stop each eigenvalue run and the trace after N {_MATVECS}", min=2
    ),
    "landscape": _effort(
        "N",
        "Points per axis of the loss along the top eigenvectors, at least 3; 0: no landscape.",
        min=0,
    ),
    "radius": _effort(
        "X", "Distance that the landscape covers along each unit eigenvector.", above=0
    ),
    "checkpoint": _effort(
        "DIR", "Save checkpoints of every part in this folder, and resume from them."
    ),
    "examples": _data_option(
        "N", "Use the first N examples.", default="200 for cifar10, 64 for hf:PATH, else all"
    ),
    "shard": option(
        "NAMES",
        "Under torchrun, divide the model too: globs over the modules whose parameters are whole "
        "only while they run, separated by commas, such as 'layers.*,head'. No line or plane.",
    ),
    "batch_size": _data_option(
        "N",
        "Split larger batches into batches of N examples.",
        default="8 for hf:PATH, else the batches of the target",
    ),
    "data": _data_option("PATH", _CIFAR10, "--data", "--data-path", default=_SEARCHED),
    "weights": _data_option("FILE", "Checkpoint of the ResNet-20.", default=_SEARCHED),
    "text": _of_text("FILE", "Text on which the loss of hf:PATH is evaluated."),
    "sequence": _of_text(
        "N",
        "Tokens per sequence.",
        default="256, or the context of the model if it is shorter",
        min=2,
    ),
}

_COMPARE: dict[str, Any] = {
    "first": typer.Argument(metavar="RUN", help="Folder of a run."),
    "second": typer.Argument(metavar="RUN", help="Folder of another run."),
    "out": option("FILE", "HTML page of the comparison."),
}

_EIG: dict[str, Any] = {
    "resume": option(
        "FILE",
        "Saved network: checkpoint.pt of hessfunc train, or any file of torch.save with a state "
        "dict.",
    ),
    "data": _data("that of the checkpoint, else digits"),
    "arch": option("NAME", _NETS, default="that of the checkpoint, else mlp"),
    "depth": option("N", _DEPTHS, default="that of the checkpoint, else 20", min=8),
    "kind": option(
        "NAME",
        "Hessian to analyse: approximate (one batch) or full (all training examples).",
        "--type",
        choices=("approximate", "full"),
    ),
    "k": option("N", "Number of eigenvalues."),
    "rtol": option("X", "Tolerance: relative residual of each eigenvalue."),
    "max_matvecs": option("N", f"Stop after N {_MATVECS}", min=2),
    "examples": _data_option(
        "N",
        "Use the first N training examples.",
        default="those of the training, with approximate at most 200",
    ),
    "batch_size": _data_option("N", "Examples per batch; limits the memory."),
    "data_path": _data_option(
        "PATH", _IMAGES, default="that of the checkpoint, else $HESSFUNC_DATA"
    ),
    "seed": _seed("the start vector"),
}

_EXPERIMENT: dict[str, Any] = {
    "name": typer.Argument(
        metavar="NAME",
        help="Experiment: exp01, exp02, exp08 or exp09.",
        parser=partial(one_of, EXPERIMENTS),
    ),
    "epochs": option("N", "Passes over the examples.", default="that of the experiment"),
    "examples": option("N", "Train on the first N examples, and test on at most N.", default="all"),
    "batch_size": option("N", "Examples per step.", default="that of the experiment"),
    "seeds": option("N", "Number of training runs per method."),
    "minutes": option("X", "Stop each training run after X minutes of steps."),
    "data_path": option("PATH", _CIFAR10, default=_SEARCHED),
    "out": option("DIR", "Folder of the results.", default="NAME"),
}

_PLAN: dict[str, Any] = {
    "target": typer.Argument(
        metavar="hf:PATH", help="Folder of a Hugging Face model; its config is enough."
    ),
    "params": option(
        "N", "Number of parameters of the network, such as 7e9 or 7B.", default="of hf:PATH"
    ),
    "algorithm": option(
        "NAME",
        "Algorithm: lanczos, power, slq, hutchinson or xtrace.",
        choices=("lanczos", "power", "slq", "hutchinson", "xtrace"),
    ),
    "k": option("N", "lanczos, power: number of eigenpairs."),
    "steps": option("N", "lanczos, power: number of products; slq: steps per probe."),
    "probes": option("N", "Number of random vectors.", default="slq 1, hutchinson 100, xtrace 50"),
    "block_size": option("N", "Vectors per block product.", default="lanczos 1, traces 10", min=1),
    "basis_size": option("N", "lanczos: maximum number of basis vectors.", default="2 k + 60"),
    "basis_dtype": option(
        "NAME",
        "lanczos: dtype of the basis, bfloat16, float32 or float64.",
        default="float32",
        choices={"bfloat16": "bf16", "float32": "fp32", "float64": "fp64"},
    ),
    "dtype": _network("NAME", "Dtype of the parameters and the graph.", choices=DTYPES),
    "trainable": _network(
        "N", "Number of trainable parameters, such as those of adapters.", default="all"
    ),
    "largest": _network(
        "N",
        "Entries of the largest parameter tensor.",
        default="that of hf:PATH, else of a transformer",
    ),
    "graph_memory": _network(
        "GiB",
        "Memory of the activations of one batch, at the peak of a product.",
        default="extrapolated from measured transformers",
    ),
    "batch_tokens": _network("N", "Tokens per batch and rank."),
    "sequence": _network("N", "Tokens per sequence.", default="2048, or the context of hf:PATH"),
    "vocabulary": _network("N", "Size of the vocabulary.", default="that of hf:PATH, else 32,000"),
    "recompute": _network(
        "", 'Recompute the layers: hf.functional(model, recompute="layers.*").', "--recompute"
    ),
    "ranks": _ranks("N", "Number of ranks, one GPU each."),
    "unsharded": _ranks(
        "", "Replicate the vectors: no space=hf.sharded(params, mesh).", "--unsharded"
    ),
    "gpu_memory": _ranks("GiB", "Memory per rank.", default="not compared"),
    "reserve": _ranks("GiB", "Part of --gpu-memory for CUDA, NCCL and allocator fragmentation."),
    "gradient_seconds": _time(
        "X",
        "Time of one gradient over the data of one rank.",
        default="6 params tokens / (ranks teraflops utilisation)",
    ),
    "tokens": _time("N", "Tokens of all batches on all ranks."),
    "teraflops": _time(
        "X", "Peak teraflops per rank.", default="67; 989 in bfloat16, float16", above=0
    ),
    "utilisation": _time("X", "Share of --teraflops that is reached.", above=0, max=1),
    "memory_bandwidth": _time("GiB/s", "Memory bandwidth of a GPU.", above=0),
    "network_bandwidth": _time("GiB/s", "Bandwidth at which a rank sends.", above=0),
    "latency": _time("us", "Latency of a collective, in microseconds."),
}

_TRAIN: dict[str, Any] = {
    "data": _data(),
    "arch": option("NAME", _NETS, default="mlp"),
    "depth": option("N", _DEPTHS, default="20", min=8),
    "method": option(
        "NAME",
        "sgd: batches of fixed size; absa: batches that grow where the loss is flat.",
        choices=("sgd", "absa"),
    ),
    "optimizer": option(
        "NAME",
        "Optimiser: sgd or newton.",
        default="newton if one of its options is given, else sgd",
        choices=("sgd", "newton"),
    ),
    "curvature": _newton(
        "NAME", f"Curvature matrix: {', '.join(BLOCKS)}.", default="hbp-abs", choices=BLOCKS
    ),
    "epochs": option("N", "Passes over the examples."),
    "batch_size": option("N", "Examples per base batch."),
    "large_ratio": option(
        "N",
        "Base batches per step: fixed for sgd, the maximum for absa.",
        default="1 for sgd, 128 for absa",
    ),
    "lr": option("X", "Learning rate.", above=0),
    "lr_decay": option("X", "Factor of the learning rate after each --lr-decay-epoch.", above=0),
    "lr_decay_epoch": option("N,N", "Epochs after which the rate decays, counted from 1."),
    "adversarial_share": _absa(
        "X", "Initial share of adversarial inputs in each base batch.", default="0.2", max=1
    ),
    "eps": _absa("X", "Size of the adversarial perturbation of the inputs.", default="0.005"),
    "patience": _absa("N", "Maximum number of epochs before the batch grows.", default="10"),
    "momentum": _sgd("X", "Share of the previous step that is kept.", default="0.9", max=1),
    "weight_decay": _sgd(
        "X",
        "Add X times the parameters to the gradient, and so X / 2 times their squared norm to the "
        "loss.",
        default="0",
    ),
    "alpha": _newton(
        "X",
        "Damping: weight of the identity in (1 - alpha) curvature + alpha I.",
        default="0.02",
        max=1,
    ),
    "solve": _newton(
        "NAME",
        "Solver: cg, or direct, which inverts the factors of the blocks.",
        default="cg",
        choices=("cg", "direct"),
    ),
    "cg_max": _newton("N", "Stop CG after N products per parameter tensor.", default="50"),
    "cg_rtol": _newton("X", "Relative tolerance of CG.", default="0.1"),
    "cg_atol": _newton("X", "Absolute tolerance of CG.", default="0"),
    "max_blocks": _newton(
        "N", "Split the curvature of each layer into N diagonal blocks (hbp).", default="1"
    ),
    "examples": _data_option(
        "N", "Train on the first N examples, and test on at most N.", default="all"
    ),
    "data_path": _data_option("PATH", _IMAGES, default=_SEARCHED),
    "track": option(
        "NAME",
        "Record the dominant Hessian eigenvalue after each epoch: top (on 200 examples, or on a "
        "base batch if that is larger) or full (on all examples).",
        default="off",
        choices=("top", "full"),
    ),
    "minutes": option("X", "Stop after X minutes of training steps."),
    "seed": _seed("weights, batches and random samples"),
    "save_every": option("N", "Save a checkpoint every N steps."),
}

_TRACK: dict[str, Any] = {
    "target": typer.Argument(metavar="TARGET", help="Function that trains: module:function."),
    "every": option("N", "Steps between two measurements, the first of which is at step 0."),
    "curvature": _MATRIX,
    "top": option("N", "Number of largest eigenvalues.", min=0),
    "bottom": option("N", "Number of smallest eigenvalues.", min=0),
    "trace_probes": option("N", "Random vectors of the trace, at least 2; 0: no trace.", min=0),
    "critical": option("", "Measure the critical sharpness along the gradient.", "--critical"),
    "preconditioned": option(
        "", "Measure the sharpness that limits the steps of the optimiser.", "--preconditioned"
    ),
    "rtol": option("X", "Tolerance: relative residual of each eigenvalue."),
    "max_matvecs": option("N", f"Stop each end of the spectrum of a point after N {_MATVECS}"),
    "seed": _seed("start vectors and probes"),
}

# Declarations by command and by the name of the parameter.
OPTIONS: dict[str, dict[str, Any]] = {
    command: _COMMON | own
    for command, own in {
        "analyze": _ANALYZE,
        "compare": _COMPARE,
        "eig": _EIG,
        "experiment": _EXPERIMENT,
        "plan": _PLAN,
        "track": _TRACK,
        "train": _TRAIN,
    }.items()
}
