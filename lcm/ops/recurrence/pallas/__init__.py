"""Recurrence kernels for TPUs.

`api` says which calls they take and lays arrays out, `vectors` is the recurrence of a vector,
`matrices` that of a matrix with its `matrix_kernels`, `erasing` with `erasing_kernels` the same of
one that erases, `channels` with `channel_kernels` either with a decay for each channel, each with
its gradient; `products`, `triangles` and `halves` are what bodies of kernels are made of. `grid`
calls those of matrices on their chunks, `mesh` runs all on the devices of a mesh, `plan` has what
is known before tracing.
"""

from lcm.ops.recurrence.pallas.api import diagonal, diagonal_fits, matrix, matrix_fits

__all__ = ["diagonal", "diagonal_fits", "matrix", "matrix_fits"]
