"""What tensors may be: of one of these types, of this shape, on this device, and what is in memory.

Errors name the argument, what was expected and what was given. Nothing looks at the elements, which would
wait for the GPU. All of this runs with every call: what is right is found right in as few steps as possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, TypeGuard

import torch

PlainTensor: TypeAlias = Any  # a torch.Tensor that `is_plain`, which type checkers cannot be told

# Types whose tensors are read where `data_ptr` says.
PLAIN = (torch.Tensor, torch.nn.Parameter)
_strided = torch.strided


def is_plain(tensor: Any) -> TypeGuard[torch.Tensor]:
    """Whether a kernel can take the tensor's pointer for the tensor."""
    return type(tensor) in PLAIN and not tensor.is_neg()


def check_tensor(
    name: str,
    tensor: PlainTensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    device: torch.device,
    *,
    strided: bool = False,
) -> None:
    """Raises TypeError or ValueError unless a tensor is as told, and contiguous or `strided`."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {tensor.dtype}; cast it")
    if tensor.layout is not _strided or tensor.is_nested:
        check_layout(name, tensor)
    if tensor.shape != shape or not (strided or tensor.is_contiguous()):
        raise ValueError(
            f"{name}: expected {'shape' if strided else 'a contiguous tensor of shape'} {list(shape)},"
            f" got {list(tensor.shape)} with strides {list(tensor.stride())}"
        )
    if tensor.device != device:
        raise ValueError(f"{name}: expected it beside the other tensors on {device}, got {tensor.device}")


def check_written(
    names: Sequence[str], written: Sequence[PlainTensor | None], **read: PlainTensor | None
) -> None:
    """Raises ValueError where tensors that were passed in cannot be written without harm: where autograd
    would have to know, and where memory is read, too, or written twice, as blocks of a kernel run in any
    order.

    `read` are the inputs by name, but for those that may be written over. As in PyTorch, tensors with gaps
    are not looked at: others may lie in these.
    """
    for number, tensor in enumerate(written):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{names[number]}: expected a tensor that requires no gradient; detach it")
    tensors = *written, *read.values()
    try:
        spans = [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors if tensor is not None]
    except RuntimeError:  # one without memory, which `address` refuses
        return
    if are_apart(spans):
        return  # as nearly always
    for number, tensor in enumerate(written):
        for other, beside in zip((*names, *read)[number + 1 :], tensors[number + 1 :], strict=True):
            if _share_memory(tensor, beside):
                raise ValueError(
                    f"{names[number]}: expected memory of its own, got some that {other} has, too"
                )


def are_apart(spans: list[tuple[int, int]]) -> bool:
    """Whether no two of these share memory: addresses and numbers of bytes, which are put in order."""
    spans.sort()
    end = 0
    for begin, num_bytes in spans:
        if begin < end:
            return False
        end = begin + num_bytes
    return True


def _share_memory(one: PlainTensor | None, other: PlainTensor | None) -> bool:
    if one is None or other is None or not (one.is_contiguous() and other.is_contiguous()):
        return False
    begin, other_begin = one.data_ptr(), other.data_ptr()
    return begin < other_begin + other.nbytes and other_begin < begin + one.nbytes


def address(name: str, tensor: PlainTensor) -> int:
    """Where the elements are; 0 if there are none.

    Raises ValueError where they are nowhere: freed, or never there, as those of some of torch's own zeros.
    """
    try:
        pointer = int(tensor.data_ptr())
    except RuntimeError:
        pointer = 0
    if not pointer and tensor.numel():
        check_layout(name, tensor)
        cuda_index(name, tensor.device)  # on no other device can one have any
        raise ValueError(f"{name}: expected a tensor with memory of its own, got one without; clone it")
    return pointer


def cuda_index(name: str, device: torch.device) -> int | None:
    """The number of a CUDA device; None for the CPU. Raises ValueError for any other."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        raise ValueError(f"{name}: expected a CUDA or CPU tensor, got one on {device}")
    return device.index


def check_layout(name: str, tensor: PlainTensor) -> None:
    """Raises TypeError unless the elements of a tensor are in memory at strides, as kernels read them."""
    if tensor.layout is not _strided or tensor.is_nested:
        what = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name}: expected a dense tensor, got a {what} one; make it dense")
