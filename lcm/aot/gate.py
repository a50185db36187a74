"""`lcm compile`: what the steps of a config need on a TPU slice, before anybody pays for one."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from lcm import config, models, nn, parallel
from lcm.aot import hlo, topology
from lcm.aot.checks import findings
from lcm.aot.chips import GIB, Bound, bound, chip
from lcm.aot.kernels import Kernel, kernels, scheduled
from lcm.aot.steps import STEPS
from lcm.errors import CompileError, ConfigError, UserError

DRIFT = 0.05  # of a budget, beyond which --check fails
# Figures that a budget holds: of one device, but for FLOPs, which are of all.
BUDGET = ("memory", "flops", "sent", "cycles")


@dataclasses.dataclass(frozen=True)
class Report:
    """One step on one mesh. Bytes, cycles and collectives are of one device, FLOPs of all.

    flops: what the jaxpr multiplies, recomputation included; parts: in closed form, of the model.
    """

    step: str
    topology: str
    mesh: dict[str, int]
    remat: str
    tokens: int
    arguments: int
    temporaries: int
    host: int
    memory: int
    capacity: int
    flops: float
    parts: dict[str, float]
    unknown: tuple[str, ...]
    collectives: dict[str, hlo.Collective]
    accessed: int
    cycles: int
    seconds: float
    findings: tuple[str, ...]
    kernels: tuple[Kernel, ...]
    bound: Bound

    @property
    def fits(self) -> bool:
        return self.memory <= self.capacity

    @property
    def sent(self) -> int:
        return sum(each.bytes for each in self.collectives.values())

    @property
    def axes(self) -> str:
        """The mesh as `--mesh` takes it."""
        return ",".join(f"{axis}={size}" for axis, size in self.mesh.items()) or "-"

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["collectives"] = {k: each._asdict() for k, each in self.collectives.items()}
        values["kernels"] = [each.as_dict() for each in self.kernels]
        values["bound"] = self.bound._asdict() | {"bottleneck": self.bound.bottleneck}
        return values | {"fits": self.fits, "headroom": self.capacity - self.memory}


def measure(cfg: Any, step: str, name: str, mesh: Any, schedules: bool = False) -> Report:
    """Compiles one step of a config for a mesh over a topology, and its kernels by themselves.

    Raises:
        CompileError: where the compiler refuses.
    """
    built = STEPS[step](cfg, mesh)
    program = built.compiled(mesh)
    module = hlo.Module(program.compiled.as_text())
    totals, kind = module.totals(), chip(name)
    return Report(
        step=step,
        topology=name,
        mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
        remat=cfg.model.remat,
        tokens=built.tokens,
        arguments=program.arguments,
        temporaries=program.temporaries,
        host=program.host,
        memory=program.memory,
        capacity=kind.memory,
        flops=program.work.flops,
        parts=parts(cfg, step, built.tokens),
        unknown=program.work.unknown,
        collectives=totals.collectives,
        accessed=totals.accessed,
        cycles=totals.cycles,
        seconds=program.seconds,
        findings=tuple(findings(cfg, mesh, program, module)),
        kernels=scheduled(cfg, step, name) if schedules else kernels(program.jaxpr),
        bound=bound(kind, program.work.flops / mesh.size, totals.accessed, totals.sent),
    )


def parts(cfg: Any, step: str, tokens: int) -> dict[str, float]:
    """FLOPs of the model in closed form, by part, without recomputation."""
    spec, length = models.spec(cfg), cfg.data.length
    passes = 3 if step == "train" else 1
    # A token of decoding sees the whole cache, one of a sequence half of it on the mean.
    seen = 2 * length if step == "decode" else length
    found: dict[str, float] = {}
    for i, layer in enumerate(spec.layers):
        for part, flops in nn.flops_by_part(layer, seen).items():
            found[part] = found.get(part, 0) + passes * tokens * spec.count(i) * flops
    if step != "prefill":  # whose logits nobody needs
        found["logits"] = passes * tokens * 2 * spec.width * spec.vocab
    return found


def mesh_of(cfg: Any, name: str) -> Any:
    """The mesh of a config over all chips of a topology.

    Raises:
        CompileError: for a topology that does not exist.
        ConfigError: for axes that do not multiply to its devices or do not divide sizes.
    """
    chip(name)
    return parallel.make(cfg, topology.devices(name))


def with_mesh(cfg: Any, text: str) -> Any:
    """The config with axes given as `fsdp=16,context=4`; those that are not named are 1.

    Raises:
        ConfigError: for an axis that there is not, or a size that is no number.
    """
    if not text:
        return cfg
    cfg = cfg.copy_and_resolve_references()
    sizes = dict.fromkeys(parallel.AXES, 1)
    for item in text.split(","):
        axis, _, size = item.partition("=")
        if axis not in sizes or not size.lstrip("-").isdigit():
            raise ConfigError(
                f"--mesh={text}: {item!r} is no axis with a size: write "
                "fsdp=16,context=4, with the axes " + ", ".join(parallel.AXES)
            )
        sizes[axis] = int(size)
    cfg.mesh.update(sizes)
    return cfg


def text(report: Report) -> str:
    """A page about one step."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items()) or "one device"
    fits = "fits" if report.fits else "DOES NOT FIT"
    room = abs(report.capacity - report.memory) / GIB
    lines = [
        f"{report.step} on {report.topology}, {mesh}, remat {report.remat}: "
        f"{report.tokens:,} tokens, compiled in {report.seconds:.0f} s",
        f"  memory        {report.memory / GIB:.2f} GiB a device of {report.capacity / GIB:.0f}: "
        f"{fits}, {room:.2f} GiB {'left' if report.fits else 'too much'} "
        f"(arguments {report.arguments / GIB:.2f}, temporaries {report.temporaries / GIB:.2f})",
        f"  FLOPs         {report.flops:.3e} in the program, "
        f"{sum(report.parts.values()):.3e} of the model: "
        + ", ".join(f"{part} {flops:.2e}" for part, flops in report.parts.items()),
    ]
    if report.host:
        lines.append(f"  host memory   {report.host / GIB:.2f} GiB for each device")
    lines += [
        f"  {kind:13} {each.count} times, {each.bytes / GIB:.2f} GiB"
        for kind, each in sorted(report.collectives.items())
    ]
    b = report.bound
    lines += [
        f"  bound         {1e3 * b.seconds:.1f} ms by {b.bottleneck} (compute "
        f"{1e3 * b.compute:.1f}, memory {1e3 * b.memory:.1f}, interconnect "
        f"{1e3 * b.interconnect:.1f}): a roofline, not a measurement",
        f"  XLA cycles    {report.cycles:.3e}, loops applied, kernels excluded",
    ]
    lines += [f"  kernel        {_kernel(each)}" for each in report.kernels]
    if report.unknown:
        lines.append(f"  not counted   {', '.join(sorted(set(report.unknown)))}")
    lines += [f"  finding       {each}" for each in report.findings]
    return "\n".join(lines)


def _kernel(kernel: Kernel) -> str:
    line = f"{kernel.name}, {kernel.runs} times, {kernel.flops:.2e} FLOPs each"
    if kernel.schedule is None:
        return line
    s = kernel.schedule
    return (
        f"{line}; {s.bundles:,} bundles, {100 * s.mxu_use:.0f} % of the matrix units' slots, "
        f"{s.fills:,} fills, {s.spills:,} spills"
    )


def budget_file(spec: str) -> pathlib.Path:
    """Where the budget of `configs/NAME.py:ARG` lies: beside it."""
    path = pathlib.Path(spec.partition(":")[0])
    return path.with_name(f"{path.stem}.budget.json")


def budget_key(spec: str, report: Report) -> str:
    argument = spec.partition(":")[2] or "-"
    return f"{argument} {report.topology} {report.axes} {report.remat} {report.step}"


def record(spec: str, reports: list[Report]) -> pathlib.Path:
    """Writes the figures of reports as budgets, beside those of other meshes."""
    file = budget_file(spec)
    known = json.loads(file.read_text()) if file.exists() else {}
    for report in reports:
        known[budget_key(spec, report)] = {name: getattr(report, name) for name in BUDGET}
    file.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
    return file


def drifts(spec: str, report: Report) -> list[str]:
    """Where a report is more than 5 % off its budget, up or down.

    Raises:
        UserError: if there is no budget of it.
    """
    file, key = budget_file(spec), budget_key(spec, report)
    known = json.loads(file.read_text()) if file.exists() else {}
    if key not in known:
        has = "; ".join(known) or "none"
        raise UserError(f"{file} has no budget of {key!r}, it has {has}: write one with --record")
    found = []
    for name, wanted in known[key].items():
        got = getattr(report, name)
        if abs(got - wanted) > DRIFT * max(abs(wanted), 1):
            change = f"{100 * (got - wanted) / wanted:+.1f} %" if wanted else "from nothing"
            found.append(f"{report.step}: {name} {got:.4g}, budget {wanted:.4g} ({change})")
    return found


def candidates(cfg: Any, name: str, remats: tuple[str, ...]) -> Iterator[Any]:
    """The config on every mesh of a topology that divides its sizes, with each way of remat.

    Axes are powers of 2; tensor goes up to 8 and divides heads, context up to where a device has
    4,096 tokens of a row.
    """
    devices = topology.devices(name)
    powers = [2**i for i in range(len(devices).bit_length())]
    long = [c for c in powers if c == 1 or cfg.data.length // c >= 4096]
    heads = [layer.heads for layer in models.spec(cfg).layers]
    narrow = [t for t in powers[:4] if all(h % t == 0 for h in heads)]
    for context, tensor, remat in itertools.product(long, narrow, remats):
        for data in (1, 2, 4, 8):
            fsdp = len(devices) // (context * tensor * data)
            if fsdp * context * tensor * data != len(devices):
                continue
            each = cfg.copy_and_resolve_references()
            each.mesh.update(data=data, fsdp=fsdp, context=context, tensor=tensor)
            each.model.remat = remat
            try:
                STEPS["train"](each, parallel.make(each, devices))
            except ConfigError:
                continue
            yield each


def ranked(reports: list[Report]) -> list[Report]:
    """Those that fit, the quickest bound first."""
    return sorted((r for r in reports if r.fits), key=lambda r: r.bound.seconds)


def run(args: Any, overrides: list[str]) -> int:
    """`lcm compile`; 1 if a budget is not kept."""
    cfg = with_mesh(config.override(config.load(args.config), overrides), args.mesh)
    wanted = args.steps.split(",")
    unknown = [step for step in wanted if step not in STEPS]
    if unknown:
        raise UserError(f"--steps={args.steps}: {unknown[0]!r} is none: take {', '.join(STEPS)}")
    if args.sweep:
        return _sweep(cfg, args)
    mesh = mesh_of(cfg, args.topology)
    reports = []
    for step in wanted:
        reports.append(measure(cfg, step, args.topology, mesh, args.kernels))
        print(text(reports[-1]), flush=True)
    _write(args.json, reports)
    if args.record:
        print(f"wrote {record(args.config, reports)}")
    if args.check:
        found = [drift for report in reports for drift in drifts(args.config, report)]
        found += [finding for report in reports for finding in report.findings]
        print("\n".join(found) or "all within budget")
        return int(bool(found))
    return 0


def _sweep(cfg: Any, args: Any) -> int:
    reports = []
    for each in candidates(cfg, args.topology, tuple(args.remat.split(","))):
        try:
            report = measure(each, "train", args.topology, mesh_of(each, args.topology))
        except CompileError as error:  # one that does not fit or compile is no reason to stop
            print(f"{dict(each.mesh)} remat {each.model.remat}: {str(error)[:200]}", flush=True)
            continue
        reports.append(report)
        print(_line(report), flush=True)
    best = ranked(reports)
    print(f"\n{len(best)} of {len(reports)} fit; by the bound of a step:")
    for report in best:
        print(_line(report))
    _write(args.json, best)
    return 0


def _write(file: pathlib.Path | None, reports: list[Report]) -> None:
    if file:
        file.write_text(json.dumps([r.as_dict() for r in reports], indent=2) + "\n")


def _line(report: Report) -> str:
    return (
        f"{report.axes:32} remat {report.remat:5} {report.memory / GIB:7.2f} GiB "
        f"{'fits' if report.fits else 'too much':8} {1e3 * report.bound.seconds:9.1f} ms by "
        f"{report.bound.bottleneck}"
    )
