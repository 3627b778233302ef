"""How kernels are launched: on the device of what they compute with."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

_Rest = ParamSpec("_Rest")
_Found = TypeVar("_Found")
_Launch = Callable[Concatenate[Tensor, _Rest], _Found]


def on_its_device(launch: _Launch[_Rest, _Found]) -> _Launch[_Rest, _Found]:
    """Run a function on the device of its first argument: Triton asks which is the current one."""

    @wraps(launch)
    def there(tensor: Tensor, *args: _Rest.args, **kwargs: _Rest.kwargs) -> _Found:
        if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
            return launch(tensor, *args, **kwargs)
        with torch.cuda.device_of(tensor):
            return launch(tensor, *args, **kwargs)

    return there
