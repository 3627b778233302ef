"""How kernels are launched: on the device of what they compute with."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

_Launch = TypeVar("_Launch", bound=Callable[..., Any])


def on_its_device(launch: _Launch) -> _Launch:
    """Run a function on the device of its first argument: Triton asks which is the current one."""

    @wraps(launch)
    def there(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
            return launch(tensor, *args, **kwargs)
        with torch.cuda.device_of(tensor):
            return launch(tensor, *args, **kwargs)

    return there  # type: ignore[return-value]  # it takes what `launch` takes
