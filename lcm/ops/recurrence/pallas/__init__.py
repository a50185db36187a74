"""Recurrence kernels for TPUs.

`api` says which calls they take and lays arrays out, `vectors` is the recurrence of a vector,
`matrices` that of a matrix with its `matrix_kernels`, each with its gradient; `mesh` runs both on
the devices of a mesh, `plan` has what is known before tracing.
"""

from lcm.ops.recurrence.pallas.api import diagonal, diagonal_fits, matrix, matrix_fits

__all__ = ["diagonal", "diagonal_fits", "matrix", "matrix_fits"]
