"""Recurrences over a sequence: of vectors, of matrices, and of the last few tokens.

    op_diag      h_t = a_t h_{t-1} + b_t, elementwise                       S4D, RG-LRU, Mamba
    op_max       m_t = max(f_t + m_{t-1}, i_t), elementwise                 mLSTM, RWKV-4
    op_matrix    S_t = diag(w_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T  Mamba-2, GLA, delta rule
    op_matrix_before                y_t of S_{t-1}, before it is written    RWKV-6
    short_conv   y_t = sum_j w_j x_{t-W+1+j}, by channel                    what stands before them

Each takes the state before its first token and gives that after its last, float32, so that a
sequence in pieces is the sequence in one. Where `reset_BL` is true a document begins, and nothing
of what came before reaches it. What leaves a state alone is the caller's to give: decay 1 and
nothing written. Tokens on several devices, on the mesh axis `context`, are one sequence too.
"""

from lcm.ops.recurrence.before import op_matrix_before
from lcm.ops.recurrence.documents import boundaries
from lcm.ops.recurrence.spread import op_diag, op_matrix, op_max, short_conv

__all__ = ["boundaries", "op_diag", "op_matrix", "op_matrix_before", "op_max", "short_conv"]
