"""AGOP, kernel products, gradients and solves shared by the processes of a ``torch.distributed`` group.

Every rank passes the same tensors, works on its share of the rows, and gets the same result. What travels are results
and vectors, never blocks of the kernel matrix. Start the processes with ``torchrun``; gloo moves CPU tensors, NCCL
CUDA tensors (one GPU a rank, ``torch.cuda.set_device`` first). The timeout given to ``init_process_group`` must cover
the longest step that ranks wait for, a direct solve for example.

All functions raise what their namesakes in ``fastagop`` raise, on every rank; ``ValueError`` where ranks pass different
inputs; and ``RankLost`` where a process of the group died or did not answer within the timeout.
"""

from fastagop.distributed.communicator import RankLost
from fastagop.distributed.operations import agop, gradients, kernel_matmul, solve

__all__ = ["RankLost", "agop", "gradients", "kernel_matmul", "solve"]
