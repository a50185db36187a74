"""The command line: `lcm COMMAND`, a function here for each.

Heavy imports wait until a command needs them, so that `lcm --help` answers at once.
"""

import argparse
import dataclasses
import inspect
import logging
import os
import pathlib
import platform
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from lcm.errors import STOPPED, UserError

MANY_HOSTS = """\
One run on many hosts is the same command on each, with --coordinator=HOST:PORT --processes=N
--process=I [--wait=SECONDS], or LCM_COORDINATOR, LCM_PROCESSES, LCM_PROCESS, LCM_WAIT instead;
--coordinator=auto asks the machine, such as a TPU slice or Slurm.
Exit status: 0 done; 75 saved after SIGTERM or Ctrl-C, 69 another process is gone, 70 a step hangs:
run the same command again; 2 something to change.
"""
DESCRIPTION = "Length in language models: train short, read long, see it."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; 0 if it did its work, 2 if the user has something to change, and the like."""
    _quiet_libraries()
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    try:
        rest, overrides = _split_overrides(argv)
        args = parser.parse_args(rest)
        if args.command is None:
            parser.print_help()
            return 2
        if overrides and args.command in ("report", "reproduce", "positions", "convert"):
            parser.error(f"lcm {args.command} takes no --config.KEY=VALUE")
        return args.run(args, overrides) or 0
    except UserError as error:
        print(f"lcm: error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _train(args: argparse.Namespace, overrides: list[str]) -> int:
    from lcm import config

    if args.help:
        cfg = config.load(args.config) if args.config else config.base()
        _print_keys(config.override(cfg, overrides))
        return 0
    if not args.config:
        raise UserError("lcm train needs --config FILE.py[:ARG]: such as configs/byte_lm.py:tiny")
    cfg = config.override(config.load(args.config), overrides)
    start = _hosts(args)
    from lcm import training
    from lcm.parallel import hosts

    with hosts.running(start):
        done = training.train(cfg, args.workdir or pathlib.Path("runs") / cfg.name)
    return 0 if done.step >= cfg.train.steps else STOPPED


def _hosts(args: argparse.Namespace) -> Any:
    from lcm.parallel import hosts

    return hosts.asked(args.coordinator, args.processes, args.process, args.wait)


def _evaluate(args: argparse.Namespace, overrides: list[str]) -> None:
    if bool(args.workdirs) == bool(args.model):
        raise UserError(
            "lcm evaluate takes either the WORKDIRs of trained runs or one --model: see "
            "lcm evaluate --help"
        )
    start = _hosts(args)
    if args.model:
        return _evaluate_model(args, overrides, start)
    for name in ("lengths", "workdir", "passkey"):
        if getattr(args, name):
            raise UserError(
                f"--{name} goes with --model: runs are evaluated by --config.eval.multiples"
            )
    from lcm import report
    from lcm.evaluation import evaluate_run
    from lcm.parallel import hosts

    with hosts.running(start), hosts.losses_said():
        files = []
        for folder in args.workdirs:
            files.append(evaluate_run(folder, overrides, everywhere=start is not None))
            if hosts.is_first():
                print(f"wrote {files[-1]}")
        if hosts.is_first():
            # What has just been measured, which with overrides is not what a report is of.
            runs = zip(report.read_all(args.workdirs), map(report.read_result, files), strict=True)
            told = [run._replace(evaluation=own.evaluation) for run, own in runs]
            print(report.summary(told))


def _evaluate_model(args: argparse.Namespace, overrides: list[str], start: Any) -> None:
    from lcm import report
    from lcm.evaluation import passkey, results
    from lcm.evaluation.pretrained import evaluate_pretrained
    from lcm.parallel import hosts

    if start and args.passkey:
        raise UserError(
            "--passkey reads and writes on one host: leave out --coordinator, --processes and "
            "--process (LCM_COORDINATOR and the like)"
        )
    options = {"lengths": args.lengths, "workdir": args.workdir, "dtype": args.dtype}
    options |= {"retrieval": args.passkey, "everywhere": start is not None}
    with hosts.running(start), hosts.losses_said():
        _, file = evaluate_pretrained(args.model, overrides, **options)
        if not hosts.is_first():
            return
        print(f"wrote {file}")
        if args.passkey:
            print(passkey.summary(results.load(file, results.PASSKEY)))
        else:
            print(report.summary([report.read_result(file)]))


def _analyse(args: argparse.Namespace, overrides: list[str]) -> None:
    from lcm import report
    from lcm.evaluation import analyse_run

    for folder in args.workdirs:
        print(f"wrote {analyse_run(folder, overrides, args.length)}")
    print(report.analysis_summary(report.read_all(args.workdirs)))


def _report(args: argparse.Namespace, overrides: list[str]) -> None:
    from lcm import report

    command = "lcm report " + " ".join(map(str, args.workdirs))
    page = report.write(args.workdirs, args.out or args.workdirs[0], command=command)
    print(report.summary(report.read_all(args.workdirs)))
    print(f"wrote {page}")


def _reproduce(args: argparse.Namespace, overrides: list[str]) -> None:
    from lcm import reproduce

    reproduce.run(args.name, args.workdir, args.scale)


def _positions(args: argparse.Namespace, overrides: list[str]) -> None:
    from lcm.report import positions

    if args.html:
        print(f"wrote {positions.write(args.html, args.name)}")
    else:
        print(positions.text(args.name))


def _convert(args: argparse.Namespace, overrides: list[str]) -> None:
    from lcm.pretrained.convert import convert

    print(f"wrote {convert(args.source, args.folder, args.dtype)}")


def _generate(args: argparse.Namespace, overrides: list[str]) -> int:
    _keep_programs()
    from lcm.decoding import console

    return console.generate(args, overrides)


def _chat(args: argparse.Namespace, overrides: list[str]) -> None:
    _keep_programs()
    from lcm.decoding import console

    console.chat(args, overrides)


def _compile(args: argparse.Namespace, overrides: list[str]) -> int:
    # Nothing is computed, and a TPU that is here must not be taken for it.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from lcm.aot import gate

    return gate.run(args, overrides)


def _launch(args: argparse.Namespace, overrides: list[str]) -> int:
    # Devices are those of the slice; one that is here must not be taken for them.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from lcm import launch

    return launch.run(args, overrides)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as any other error of the user, in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: see {self.prog} --help")


def _folder(text: str) -> pathlib.Path:
    """A path, not an empty one: an unset shell variable would mean the folder one is in."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return pathlib.Path(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lcm", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    train = commands.add_parser(
        "train", help="train a model; the same command resumes it", add_help=False
    )
    train.add_argument("--config", help="FILE.py or FILE.py:ARG, as in configs/byte_lm.py:tiny")
    train.add_argument("--workdir", type=_folder, help="folder of the run (runs/NAME)")
    train.add_argument("-h", "--help", action="store_true", help="list the keys of a config")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "evaluate", help="loss by length of trained runs, or of a pretrained model"
    )
    evaluate.add_argument("workdirs", nargs="*", type=_folder, metavar="WORKDIR")
    evaluate.add_argument("--model", help="a folder, a .gguf, or a name: smollm2-135m")
    evaluate.add_argument("--lengths", type=_numbers, default=(), help="of --model: 4096,8192")
    evaluate.add_argument("--passkey", action="store_true", help="of --model: retrieval, not loss")
    evaluate.add_argument("--workdir", type=_folder, help="of --model: for its results (runs/NAME)")
    evaluate.add_argument("--dtype", default="float32", help="of --model's weights: or bfloat16")
    evaluate.set_defaults(run=_evaluate)
    for command in (train, evaluate):
        command.add_argument("--coordinator", help="HOST:PORT of process 0, or auto")
        command.add_argument("--processes", type=int, help="how many processes there are")
        command.add_argument("--process", type=int, help="which of them this is, from 0")
        command.add_argument("--wait", type=int, help="seconds they wait for one another (300)")

    analyse = commands.add_parser("analyse", help="look at attention, or states, of trained runs")
    analyse.add_argument("workdirs", nargs="+", type=_folder, metavar="WORKDIR")
    analyse.add_argument(
        "--length", type=int, default=0, help="beside the trained one (4 times as much)"
    )
    analyse.set_defaults(run=_analyse)

    report = commands.add_parser("report", help="compare runs in one HTML page")
    report.add_argument("workdirs", nargs="+", type=_folder, metavar="WORKDIR")
    report.add_argument("--out", type=_folder, help="page or folder (the first WORKDIR)")
    report.set_defaults(run=_report)

    again = commands.add_parser("reproduce", help="run an experiment of experiments/")
    again.add_argument("name", help="its folder, such as quickstart")
    again.add_argument("--workdir", type=_folder, help="where it works (runs/NAME)")
    again.add_argument("--scale", default="cpu", help="cpu (default) or tiny, a smoke test")
    again.set_defaults(run=_reproduce)

    about = commands.add_parser("positions", help="what position encodings there are")
    about.add_argument("name", nargs="?", default="", help="one of them in full, such as yarn")
    about.add_argument("--html", type=_folder, help="write a page with pictures to this file")
    about.set_defaults(run=_positions)

    convert = commands.add_parser("convert", help="write any model as a Hugging Face folder")
    convert.add_argument("source", help="a workdir, a folder, a .gguf, or a name: smollm2-135m")
    convert.add_argument("folder", type=_folder, help="the folder to write, new or empty")
    convert.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")
    convert.set_defaults(run=_convert)

    ahead = commands.add_parser(
        "compile", help="compile a config for a TPU slice that is not here: does it fit?"
    )
    ahead.add_argument("--config", required=True, help="FILE.py or FILE.py:ARG")
    ahead.add_argument("--topology", required=True, help="a slice, such as v5p:4x4x4 or v5e:16x16")
    ahead.add_argument("--mesh", default="", help="axes, such as fsdp=16,context=4 (the config's)")
    ahead.add_argument("--steps", default="train,prefill,decode", help="some of them (all)")
    ahead.add_argument("--json", type=_folder, help="write the same for machines to this file")
    ahead.add_argument("--kernels", action="store_true", help="with schedules of Pallas kernels")
    ahead.add_argument("--record", action="store_true", help="write the budget beside the config")
    ahead.add_argument(
        "--check", action="store_true", help="fail on findings, and on 5 %% off the budget"
    )
    ahead.add_argument("--sweep", action="store_true", help="try meshes and remat, rank what fits")
    ahead.add_argument("--remat", default="dots,full", help="of --sweep: none, dots, full")
    ahead.set_defaults(run=_compile)

    start = commands.add_parser("launch", help="train on a TPU slice of the cloud")
    start.add_argument("--tpu", required=True, help="its type: v5p-128 (64 chips), v5e-16, v6e-256")
    start.add_argument("--config", required=True, help="FILE.py or FILE.py:ARG of a checkout")
    start.add_argument("--workdir", default="", help="gs://BUCKET/FOLDER, or a path workers share")
    start.add_argument("--dry-run", action="store_true", help="print the script and run nothing")
    start.add_argument("--name", default="", help="of the slice or workload (the config's)")
    for place in ("zone", "project"):
        start.add_argument(f"--{place}", default="", help="of the cloud (what gcloud is set to)")
    capacity = start.add_mutually_exclusive_group()
    capacity.add_argument("--spot", action="store_true", help="capacity that may be taken away")
    capacity.add_argument("--reserved", action="store_true", help="capacity that is reserved")
    start.add_argument("--runtime", default="", help="software of the machines (the type's)")
    start.add_argument("--cluster", default="", help="a cluster of Kubernetes: by xpk, not gcloud")
    start.add_argument("--image", default="python:3.12", help="of --cluster: what lcm goes into")
    start.add_argument("--restarts", type=int, default=10, help="after preemptions, at most (10)")
    start.add_argument("--wait", type=int, default=1440, help="minutes for a slice to come (1440)")
    start.add_argument("--delete", action="store_true", help="delete the slice when all is over")
    start.set_defaults(run=_launch)

    generate = commands.add_parser("generate", help="go on with a prompt, or with a file of them")
    given = generate.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", help="the text; - reads it from standard input")
    given.add_argument("--batch", type=_folder, help="JSON lines, each with a prompt or messages")
    generate.add_argument("--out", type=_folder, help="of --batch: where to (BATCH.out.jsonl)")
    generate.add_argument("--chat", action="store_true", help="the prompt is a user's message")
    generate.add_argument("-n", type=int, default=1, help="texts for the prompt, likeliest first")
    generate.add_argument("--beams", type=int, default=0, help="search with so many beams")
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="talk to a model; /help there")
    chat.add_argument("--system", default="", help="what the model is told beforehand")
    chat.set_defaults(run=_chat)
    for command in (generate, chat):
        _add_decoding(command)
    for command in (train, evaluate, analyse, ahead, start, generate, chat):
        command.epilog = "--config.KEY=VALUE overrides a key; lcm train --help lists them."
    return parser


def _add_decoding(command: argparse.ArgumentParser) -> None:
    """The options of a model that writes; those of sampling are the fields of `Sampling`."""
    from lcm.decoding.settings import Sampling

    command.add_argument(
        "--model", required=True, help="a workdir, a folder, a .gguf, or a name: smollm2-135m"
    )
    command.add_argument("--weights", default="", help="matrices in bfloat16 or int8 (as loaded)")
    command.add_argument("--stop", action="append", default=[], help="a string that ends the text")
    command.add_argument(
        "--full",
        default="",
        help="beyond the trained length: refuse (default), slide, config (default with "
        "--config.model.positions), or an extension such as self_extend",
    )
    command.add_argument("--rows", type=int, default=8, help="texts at a time (8)")
    command.add_argument("--cache", default="contiguous", help="contiguous (default) or paged")
    command.add_argument("--cache-dtype", default="", help="float32, bfloat16 or int8")
    for field in dataclasses.fields(Sampling):
        default = field.default
        kind = _numbers if isinstance(default, tuple) else int if default is None else type(default)
        command.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            default=argparse.SUPPRESS,
            help=f"sampling ({default})",
        )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """`--config.a.b=v` and `--config.a.b v` apart from the rest, as `a.b=v` in their order."""
    rest, overrides = [], []
    words = iter(argv)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
            continue
        assignment = word.removeprefix("--config.")
        value = None if "=" in assignment else next(words, None)
        overrides.append(assignment if value is None else f"{assignment}={value}")
    return rest, overrides


def _print_keys(cfg: object) -> None:
    """The keys with the values of this config, each with its meaning."""
    from lcm import config, nn, positions

    print("usage: lcm train --config FILE.py[:ARG] [--workdir DIR] [--config.KEY=VALUE ...]\n")
    print(MANY_HOSTS)
    for key, meaning, value in config.describe(cfg):
        print(f"  --config.{key}={value}\n      {meaning}")
    print(f"\nMixers: {', '.join(nn.MIXERS)}.")
    print(f"Position encodings: {', '.join(positions.ENCODINGS)}; joined by +, a chain.")


def _version() -> str:
    from importlib import metadata

    try:
        return f"lcm {metadata.version('lcm')}"
    except metadata.PackageNotFoundError:
        return "lcm (not installed)"


def _keep_programs() -> None:
    """Compiled programs go into a cache of this machine's, so that the next start is quick."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(home) / "lcm" / platform.node()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def _quiet_libraries() -> None:
    """Our own notes on standard error; what libraries print of an error, the error itself says."""
    logging.basicConfig(level=logging.CRITICAL + 1, format="lcm: %(message)s")
    logging.getLogger("lcm").setLevel(logging.INFO)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    usual = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        # After one failed read or write of a checkpoint, the others under way report to nobody:
        # in coroutines, of which lcm itself has none, or to an event loop that has ended.
        ended = str(unraisable.exc_value) == "Event loop is closed"
        if not ended and not inspect.iscoroutine(unraisable.object):
            usual(unraisable)

    sys.unraisablehook = hook
