"""The processes of a run: started by Accelerate, and the few things they do together."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from torch import Tensor, distributed, nn

from trainer.errors import ConfigError, LockstepError
from trainer.process import launcher
from trainer.process.exit import delay_exit_for_gloo

# What a launcher asks for through the environment and a run's config must decide: (variable, values that ask
# for nothing, what to do instead).
LAUNCHER_SETTINGS = (
    ("ACCELERATE_MIXED_PRECISION", {"no", "fp32"}, "set train.precision instead"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", {"1"}, "set batch.size and batch.micro_size instead"),
    ("ACCELERATE_DYNAMO_BACKEND", {"no"}, "set train.compile=true instead"),
    ("ACCELERATE_USE_DEEPSPEED", {"false"}, "DeepSpeed scales and steps by itself; start plain processes"),
    (
        "ACCELERATE_USE_MEGATRON_LM",
        {"false"},
        "Megatron-LM scales and steps by itself; start plain processes",
    ),
    ("ACCELERATE_USE_FSDP", {"false"}, "FSDP is not supported; start plain processes"),
)


def check_launcher(precision: str, environment: Mapping[str, str]) -> None:
    """Refuse what a launcher asks for beside the config: a run is a function of its config."""
    for variable, nothing, instead in LAUNCHER_SETTINGS:
        value = environment.get(variable, "").lower()
        if value and value not in nothing and value != precision:
            raise ConfigError(variable, f'the launcher asks for "{value}", which the config decides; {instead}')


class Ranks:
    """This process among the run's processes.

    Attributes: `rank` of `count`, `is_main` (rank 0), `device`, and `accelerator` beneath.
    """

    def __init__(self, precision: str, *, find_unused_parameters: bool) -> None:
        check_launcher(precision, os.environ)
        self.accelerator = Accelerator(
            mixed_precision="no",  # `Precision` does it, with one code path for every device
            cpu=None if torch.accelerator.is_available() else True,  # else torchrun's processes stay unjoined
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                    find_unused_parameters=find_unused_parameters,
                )
            ],
        )
        self.rank: int = self.accelerator.process_index
        self.count: int = self.accelerator.num_processes
        launched = launcher.world_size()
        if launched != self.count:
            raise ConfigError(
                "WORLD_SIZE", f"{launched} processes were launched, and {self.count} joined; use launch/*.yaml"
            )
        if self.count > 1:
            delay_exit_for_gloo()
        self.is_main: bool = self.accelerator.is_main_process
        self.device: torch.device = self.accelerator.device
        # Host-side agreement must not wait for the device's queue, so on GPUs it has a group of its own.
        on_host = self.count == 1 or self.device.type == "cpu"
        self._host_group: Any = None if on_host else distributed.new_group(backend="gloo")

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model on its device, in DDP where there are several processes; one prepared before it is let go."""
        self.accelerator.free_memory()
        with warnings.catch_warnings():  # newer torch renames the option, older torch knows no other name
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            prepared: nn.Module = self.accelerator.prepare_model(model)
        return prepared

    def broadcast_parameters(self, model: nn.Module) -> nn.Module:
        """The model with rank 0's parameters and buffers on every rank."""
        if self.count > 1:
            for tensor in model.state_dict().values():
                distributed.broadcast(tensor, src=0)
        return model

    def main_first(self) -> AbstractContextManager[None]:
        """The main process runs the body first, the others after it."""
        context: AbstractContextManager[None] = self.accelerator.main_process_first()
        return context

    def node_main_first(self) -> AbstractContextManager[None]:
        """One process of each machine runs the body first, its others after it."""
        context: AbstractContextManager[None] = self.accelerator.local_main_process_first()
        return context

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place."""
        if self.count > 1:
            distributed.all_reduce(tensor)
        return tensor

    def all_gather_by_sends(self, shard: Tensor, whole: Tensor) -> None:
        """Fill `whole`, `(ranks, n)`, with every rank's `shard`, `(n,)`.

        From one to another, without a stop between: on gloo that takes a third of the time of its `all_gather`.
        """
        whole[self.rank].copy_(shard)
        exchanges = []
        for distance in range(1, self.count):
            to, source = (self.rank + distance) % self.count, (self.rank - distance) % self.count
            exchanges.append(distributed.P2POp(distributed.isend, shard, to))
            exchanges.append(distributed.P2POp(distributed.irecv, whole[source], source))
        for work in distributed.batch_isend_irecv(exchanges):
            work.wait()

    def close(self) -> None:
        """Leave the other ranks in good order. Nothing can be done together afterwards."""
        if self.count > 1:
            distributed.destroy_process_group()

    def any_rank_async(self, flag: bool) -> Agreement:
        """Start to ask whether any rank raises `flag`; `result()` tells, the same on every rank."""
        if self.count == 1:
            return Agreement(flag, None)
        vote = torch.tensor(int(flag))
        work = distributed.all_reduce(vote, distributed.ReduceOp.MAX, group=self._host_group, async_op=True)
        return Agreement(vote, work)

    def gather(self, items: list[Any]) -> list[Any]:
        """The concatenation of every rank's `items`, in rank order, on every rank."""
        return list(gather_object(items)) if self.count > 1 else items

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Run `action` on the main process; every rank gets its result, or fails alike if it fails."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except OSError as error:
                outcome[1] = LockstepError(
                    f"cannot write {error.filename or 'a file'}: {error.strerror or error}; what was complete before "
                    f"is untouched, and run.resume=auto goes on from the last checkpoint"
                )
            except LockstepError as error:
                outcome[1] = error
            except Exception as error:  # a defect: shown here with its traceback, and the others must not wait
                if self.count > 1:
                    broadcast_object_list([None, LockstepError(f"the main process failed: {error}")])
                raise
        if self.count > 1:
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


class Agreement:
    """The answer to come of `Ranks.any_rank_async`."""

    def __init__(self, vote: Tensor | bool, work: Any) -> None:
        self._vote = vote
        self._work = work

    def result(self) -> bool:
        if self._work is not None:
            self._work.wait()
        return bool(self._vote)
