"""A GPU where there is none.

The device `meta`, which has no memory, plays it. A mode between the program and torch notes every
number that the program wants to see, every tensor that is moved, and where random numbers are
drawn; numbers that are read it makes up.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("meta")


class GpuGenerator(torch.Generator):
    "A generator that says it lives on the GPU; its state has 16 bytes, as there."

    device = GPU
    state = torch.arange(16, dtype=torch.uint8)

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


class Watching(TorchDispatchMode):
    """Notes the traffic between the program and the GPU.

    answer: what every number is that is read.
    waits: how often a number was read.
    arrivals: how many tensors came from the CPU.
    draws: (name, device) of each draw of random numbers.
    """

    def __init__(self, answer=0.5):
        super().__init__()
        self.answer, self.waits, self.arrivals, self.draws = answer, 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if name == "aten::_fused_adam_":
            return None  # there is none for tensors without memory
        if name == "aten::_local_scalar_dense" and args[0].device == GPU:
            self.waits += 1
            return args[0].dtype == torch.bool or self.answer
        if name == "aten::_to_copy" and args[0].device == GPU:
            if kwargs.get("device", GPU) != GPU:
                self.waits += 1
                return torch.full(args[0].shape, self.answer, dtype=args[0].dtype)
        if name == "aten::_to_copy" and args[0].device != GPU:
            self.arrivals += kwargs.get("device") == GPU
        if name == "aten::copy_" and args[0].device != args[1].device:
            self.arrivals += args[0].device == GPU
            self.waits += args[1].device == GPU

        result = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.draws.append((name.removeprefix("aten::"), result.device))
        return result
