"""Recurrence kernels for TPUs.

`api` says which calls they take and lays arrays out, `vectors` is the recurrence of a vector,
`matrices` that of a matrix with its `matrix_kernels`, `erasing` with `erasing_kernels` the same of
one that erases, each with its gradient; `products` and `triangles` are what bodies of kernels are
made of. `grid` calls both on their chunks, `mesh` runs all on the devices of a mesh, `plan` has
what is known before tracing.
"""

from lcm.ops.recurrence.pallas.api import diagonal, diagonal_fits, matrix, matrix_fits

__all__ = ["diagonal", "diagonal_fits", "matrix", "matrix_fits"]
