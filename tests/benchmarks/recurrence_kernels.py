"""Schedules of our TPU kernels for recurrences beside what XLA makes of the same, by its estimate.

No TPU is needed:

    pip install 'jax[tpu]'
    JAX_PLATFORMS=cpu python tests/benchmarks/recurrence_kernels.py     # an hour on two cores
    ... --topologies v6e:2x2 --only "matrix b" --sides kernels

One row, forward and all gradients: `op_diag` of RG-LRU in float32, `op_matrix` of Mamba-2 with 24
heads of 64 that share q and k of 128, 16,384 tokens, and with `erase` of Gated DeltaNet in bfloat16
with 16 heads of keys of 128 and as many of values or, as in Qwen3-Next, 32; 4,096 tokens. As many
of GLA and of KDA in bfloat16, 16 heads of 128 that share nothing, whose decays, and a and b of KDA,
are float32. XLA is in chunks of 256, of 64 where it erases or channels decay.

    cycles       XLA's own estimates, loops applied. Of kernels all bundles for each turn of their
                 loop, those outside of it too, so at most that; and XLA's for what is beside
    MiB          XLA reads and writes, loops applied, each operand once an operation
    temporaries  MiB

Measured with jax 0.10.2, libtpu 0.0.42.1, millions of cycles:

                               XLA                      kernels
                            cycles   MiB   temporaries  cycles   MiB   temporaries
    v5e  vector 2560 x 4096    8.9     280           0     0.7    360            0
         vector 2560 x 32768  77.6  86,080           0       -      -            -
         vector 4096 x 4096   13.4   1,728           0       -      -            -
         vector 4096 x 32768 111.8 137,728           0     6.4  4,608            0
         matrix float32       19.8  55,533          48     7.3  1,345          243
         matrix bfloat16      16.8  24,865          48     4.9    766          145
    v5p  vector 2560 x 4096    6.7   5,692          16     0.5    360            0
         matrix float32       19.4  58,447         297     6.0  1,652          339
         matrix bfloat16      16.8  32,777         104     4.3  1,001          240
    v6e  vector 2560 x 4096    5.4  13,799           0     0.6    360            0
         matrix float32       14.6  49,877         192     6.2  1,525          288
         matrix bfloat16      11.7  31,205          96     4.2    797          168

With `erase`, forward alone and with all gradients:

    v5e  delta 16 forward      16.8      49           0     1.1     98            0
         delta 16 both         43.6  30,259         131     3.3    361           51
         delta 32 forward      21.6   6,289          32     2.1    156            4
         delta 32 both         65.7 130,584         451     5.9    836          120
    v5p  delta 16 forward      23.3   1,360          12     1.0    265           50
         delta 16 both         62.6  69,414         294     2.9    719          114
         delta 32 forward      27.2  31,530         145     2.0    370           68
         delta 32 both         72.6 138,377         595     5.4    974          208
    v6e  delta 16 forward       9.3      49           0     0.9    290            0
         delta 16 both         26.7  33,554         147     2.6    899           65
         delta 32 forward      12.9  12,561          65     1.7    660            3
         delta 32 both         44.9 118,772         514     5.1  2,390          160

Bundles of a turn, forward and backward, where there is no figure none was taken:

    vector of 2560    v5e 492 and 527      v5p 407 and 487      v6e 573 and 560
    matrix float32    v5e 3872 and 8160    v5p 3891 and 8182    v6e 3345 and 6856
    matrix bfloat16   v5e 2549 and 4839    v5p 2699 and 4862    v6e 2190 and 4034
    delta 32          v5e 7060 and 12345   v5p 7118 and 12381   v6e 6126 and 11503

Kernels win everywhere that was compared, in cycles 2.4 to 23 times. They keep more: chunks are of
128 tokens, whose states are twice as many, and each block of 512 channels has its own part of the
gradients of q and k.

Mamba-1, forward and gradients of 2048 tokens of 5120 channels of 16 on v5e: XLA 177.1M cycles and
95,078 MiB; with kernels 42.1M beside them and 22,486 MiB with channels along lanes, 71.6M and
25,066 MiB with both axes in one as they come.

Where they erase, matrix units are busy for 73 to 75 % of all bundles, on v6e, whose units are of
256, for 42 to 47 %. Chunks of 64 tokens take 14 % more bundles on v5e, 17 % on v6e. Of a and b in
float32 for each head, in place of keys and a rate, the kernels of "delta 32 both" take 6.4M in
place of 5.0M on v5e, XLA 63.1M, and in its chunks of 256 116.8M.

With decays by channel:

    v5e  GLA forward            5.8   2,112           0     0.6    131            1
         GLA both              21.0   8,624          65     2.2    533           49
         KDA forward           24.9   2,113           0     2.1    387           50
         KDA both              75.1  14,896          65     6.4  1,173          146
    v5p  GLA forward            5.5   3,030           5     0.5    339           82
         GLA both              20.2  15,866          94     1.8    838          113
         KDA forward           26.5   4,644          14     2.1    563          146
         KDA both              78.8  31,157         115     6.0  1,398          209
    v6e  GLA forward            5.0   2,112           0     0.5    769           18
         GLA both              18.3   8,592          65     1.6  1,138           50
         KDA forward           21.3   2,113           0     2.5    929           66
         KDA both              67.3  17,872          65     6.8  2,690          163

    GLA                v5e 3536 and 8816      v5p 3467 and 8710      v6e 3229 and 6728
    KDA                v5e 7709 and 14059     v5p 7797 and 14129     v6e 9559 and 14946

Chunks of 256, which are XLA's own choice, cost it 6.9M and 25.1M for GLA and 63.0M and 162.2M for
KDA on v5e. Kernels have chunks of 128 for GLA, where those of 64 take 15 % more cycles forward and
back. For KDA they have 64: with 128 their two passes take 11 % more on v5e and 18 % less on v6e.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcm import aot
from lcm.aot import hlo
from lcm.ops.recurrence import op_diag, op_matrix

MIB = 2**20
HEADS, SIZE, STATES, TOKENS = 24, 64, 128, 16384
XLA_CHUNK = 256  # what "0" is without kernels; a chunk that is asked for is XLA's
RULES, XLA_RULES = 4096, 64  # tokens of the delta rule, and what suits XLA best there


class Case(NamedTuple):
    """A recurrence, turns of the loops of its kernels, and the chunk of XLA."""

    name: str
    build: Callable[..., tuple]
    given: tuple
    turns: int
    xla_chunk: int = XLA_CHUNK


def vector(length: int, width: int, dtype: str, chunk: int) -> tuple:
    """`op_diag` of RG-LRU."""
    x = jax.ShapeDtypeStruct((1, length, width), dtype)
    d = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return _both(lambda a, b: op_diag(a, b, chunk=chunk)[0]), (d, x, x)


def matrix(dtype: str, chunk: int) -> tuple:
    """`op_matrix` of Mamba-2, whose heads share q and k."""
    shape = lambda *s, dtype=dtype: jax.ShapeDtypeStruct((1, TOKENS, *s), dtype)  # noqa: E731
    q, v, l = shape(1, STATES), shape(HEADS, SIZE), shape(HEADS, dtype="float32")
    return _both(lambda q, k, v, l: op_matrix(q, k, v, l, chunk=chunk)[0]), (v, q, q, v, l)


def delta(heads: int, backward: bool, chunk: int) -> tuple:
    """`op_matrix` of Gated DeltaNet as in Qwen3-Next: 16 heads of keys and some of values."""
    shape = lambda *s, dtype="bfloat16": jax.ShapeDtypeStruct((1, RULES, *s), dtype)  # noqa: E731
    q, v, l = shape(16, STATES), shape(heads, STATES), shape(heads, dtype="float32")

    def run(q: jax.Array, k: jax.Array, v: jax.Array, l: jax.Array, rate: jax.Array) -> jax.Array:
        return op_matrix(q, k, v, l, (k, k, rate), chunk=chunk)[0]

    given = q, q, v, l, l
    return (_both(run), (v, *given)) if backward else (run, given)


def channel(erases: bool, backward: bool, chunk: int) -> tuple:
    """`op_matrix` of GLA, or of KDA, whose a and b are float32, with 16 heads of 128."""
    shape = lambda dtype: jax.ShapeDtypeStruct((1, RULES, 16, STATES), dtype)  # noqa: E731
    v, l = shape("bfloat16"), shape("float32")

    def run(*given: jax.Array) -> jax.Array:
        q, k, v, l, *erase = given
        return op_matrix(q, k, v, l, tuple(erase) or None, chunk=chunk)[0]

    given = v, v, v, l, *[l, l] * erases
    return (_both(run), (v, *given)) if backward else (run, given)


def _both(run: Callable) -> Callable:
    def both(d: jax.Array, *given: jax.Array) -> tuple:
        y, pull = jax.vjp(run, *given)
        return y, pull(d)

    return both


def cases() -> list[Case]:
    from lcm.ops.recurrence.pallas import channels, erasing, matrices, plan, vectors

    found = []
    for length in (4096, 32768):
        for width in (2560, 4096):
            turns = length // vectors.ROWS * -(-width // plan.block(width, vectors.WIDEST))
            given = length, width, "float32"
            found.append(Case(f"vector {width} x {length}", vector, given, turns))
    block = matrices.block(HEADS, SIZE, STATES)
    turns = TOKENS // matrices.CHUNK * (HEADS // block)
    found += [Case(f"matrix {t}", matrix, (t,), turns) for t in ("float32", "bfloat16")]
    for heads in (16, 32):
        turns = RULES // erasing.CHUNK * (heads // erasing.block(heads, STATES, STATES))
        for backward in (False, True):
            name = f"delta {heads} {'both' if backward else 'forward'}"
            found.append(Case(name, delta, (heads, backward), turns, XLA_RULES))
    for name, erases in (("GLA", False), ("KDA", True)):
        size = channels.ERASING if erases else channels.CHUNK
        turns = RULES // size * (16 // erasing.block(16, STATES, STATES))
        for backward in (False, True):
            whole = f"{name} {'both' if backward else 'forward'}"
            found.append(Case(whole, channel, (erases, backward), turns, XLA_RULES))
    return found


def of_xla(case: Case, topology: str) -> tuple[str, hlo.Totals, int]:
    fn, args = case.build(*case.given, case.xla_chunk)
    program = aot.compile(fn, *args, topology=topology)
    totals = hlo.Module(program.compiled.as_text()).totals()
    return f"XLA {totals.cycles / 1e6:.2f}M", totals, _temporaries(program)


def _temporaries(program: aot.Program) -> int:
    """As XLA states them, like the figures that these are compared with."""
    return program.compiled.memory_analysis().temp_size_in_bytes


def of_kernels(case: Case, topology: str) -> tuple[str, hlo.Totals, int]:
    """Bundles of a kernel once for each turn, though some are outside of its loop, and the cycles
    of what XLA does beside."""
    fn, args = case.build(*case.given, 0)
    program = aot.compile(fn, *args, topology=topology)
    totals = hlo.Module(program.compiled.as_text()).totals()
    found = aot.schedules(case.build, *case.given, 0, topology=topology)
    bundles = {("backward" if "transpose" in n else "forward"): s for n, s in found.items()}
    cycles = totals.cycles + case.turns * sum(s.bundles for s in bundles.values())
    each = ", ".join(f"{n} {s.bundles} (mxu {s.mxu_use:.0%})" for n, s in bundles.items())
    return f"kernels {cycles / 1e6:.2f}M of {case.turns} x [{each}]", totals, _temporaries(program)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topologies", nargs="*", default=["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
    parser.add_argument("--only", default="", help="cases whose names have this in them")
    parser.add_argument("--sides", nargs="*", choices=[*SIDES], default=[*SIDES])
    given = parser.parse_args()
    for topology in given.topologies:
        for case in (case for case in cases() if given.only in case.name):
            for side in given.sides:
                told, totals, temporaries = SIDES[side](case, topology)
                print(
                    f"{topology:10} {case.name:20} {told}; {totals.accessed / MIB:.0f} MiB "
                    f"accessed, {temporaries / MIB:.0f} MiB temporaries",
                    flush=True,
                )


SIDES = {"xla": of_xla, "kernels": of_kernels}

if __name__ == "__main__":
    main()
