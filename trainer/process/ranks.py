"""This process among the run's processes (ranks), and their collective operations. Accelerate starts and joins them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object, patch_environment
from torch import Tensor, distributed, nn

from trainer.errors import LockstepError
from trainer.process.exit import delay_exit_for_gloo
from trainer.process.launcher_settings import check_launcher_settings, check_world_size


class Ranks:
    """This process among the run's processes.

    Attributes: `rank` of `count`; `is_main`, true on rank 0; `device`; `accelerator`, Accelerate's own object.
    """

    def __init__(self, precision: str) -> None:
        """Join the processes. `precision` is the config's, which the launcher must not contradict."""
        check_launcher_settings(precision)
        self.accelerator = Accelerator(
            mixed_precision="no",  # `Precision` does it, with one code path for every device
            cpu=None if torch.accelerator.is_available() else True,  # without True, torchrun's processes do not join
        )
        self.rank: int = self.accelerator.process_index
        self.count: int = self.accelerator.num_processes
        self.is_main: bool = self.accelerator.is_main_process
        self.device: torch.device = self.accelerator.device
        check_world_size(self.count)
        if self.count > 1:
            delay_exit_for_gloo()
        # On GPUs, ranks agree in a group of their own on the host: the GPU's group would wait for queued kernels.
        self._host_group: Any = None
        if self.count > 1 and self.device.type != "cpu":
            self._host_group = distributed.new_group(backend="gloo")

    # ---------------------------------------------------------------- models

    def prepare(self, model: nn.Module, *, find_unused_parameters: bool = False) -> nn.Module:
        """The model on its device, wrapped in DDP if there are several processes; releases one prepared before."""
        self.accelerator.free_memory()
        self.accelerator.ddp_handler = DistributedDataParallelKwargs(
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=find_unused_parameters,
        )
        with warnings.catch_warnings():  # newer torch renames the option, older torch has the old name only
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            # DDP keeps to the device that the model is on. Accelerate would name LOCAL_RANK's, which does not exist
            # where a launcher shows each process one GPU (`srun --gpus-per-task=1`).
            with patch_environment(accelerate_bypass_device_map="true"):
                prepared: nn.Module = self.accelerator.prepare_model(model)
        return prepared

    def broadcast_parameters(self, model: nn.Module) -> nn.Module:
        """The model with rank 0's parameters and buffers on every rank."""
        if self.count > 1:
            for tensor in model.state_dict().values():
                distributed.broadcast(tensor, src=0)
        return model

    # ---------------------------------------------------------------- tensors

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place."""
        if self.count > 1:
            distributed.all_reduce(tensor)
        return tensor

    def all_gather_by_sends(self, shard: Tensor, whole: Tensor) -> None:
        """Fill `whole`, `(ranks, n)`, with every rank's `shard`, `(n,)`.

        On the CPU all sends and receives are started at once: on gloo that takes a third of the time of its
        `all_gather`. A GPU's tensors may be on a group that has no point-to-point transfers for them.
        """
        if self.device.type != "cpu":
            distributed.all_gather_into_tensor(whole.view(-1), shard)
            return
        whole[self.rank].copy_(shard)
        exchanges = []
        for distance in range(1, self.count):
            destination = (self.rank + distance) % self.count
            source = (self.rank - distance) % self.count
            exchanges.append(distributed.P2POp(distributed.isend, shard, destination))
            exchanges.append(distributed.P2POp(distributed.irecv, whole[source], source))
        for work in distributed.batch_isend_irecv(exchanges):
            work.wait()

    # ---------------------------------------------------------------- Python objects and decisions

    def gather(self, items: list[Any]) -> list[Any]:
        """The concatenation of every rank's `items`, in rank order, on every rank."""
        return list(gather_object(items)) if self.count > 1 else items

    def any_rank_async(self, flag: bool) -> Agreement:
        """Start asking whether `flag` is true on any rank; `result()` gives the answer, the same on every rank."""
        if self.count == 1:
            return Agreement(flag, None)
        vote = torch.tensor(int(flag))
        work = distributed.all_reduce(vote, distributed.ReduceOp.MAX, group=self._host_group, async_op=True)
        return Agreement(vote, work)

    def any_rank_each(self, flags: list[bool]) -> list[bool]:
        """For each flag, whether it is true on any rank: waits for the other hosts, never for a GPU."""
        if self.count == 1:
            return flags
        votes = torch.tensor(flags, dtype=torch.int32)
        distributed.all_reduce(votes, distributed.ReduceOp.MAX, group=self._host_group)
        return [bool(vote) for vote in votes.tolist()]

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Run `action` on the main process. Every rank returns its result, or raises the same error if it fails."""
        result: Any = None
        failure: LockstepError | None = None
        if self.is_main:
            try:
                result = action()
            except OSError as error:
                failure = _explain_write_error(error)
            except LockstepError as error:
                failure = error
            except Exception as error:
                # A defect of the program. This rank shows the traceback, and the others must not wait for a result.
                self._broadcast([None, LockstepError(f"the main process failed: {error}")])
                raise
        result, failure = self._broadcast([result, failure])
        if failure is not None:
            raise failure
        return result

    def _broadcast(self, values: list[Any]) -> list[Any]:
        """The main process's values, on every rank."""
        if self.count > 1:
            broadcast_object_list(values)
        return values

    # ---------------------------------------------------------------- order, and the end

    def main_first(self) -> AbstractContextManager[None]:
        """A context whose body the main process runs first, the others after it."""
        context: AbstractContextManager[None] = self.accelerator.main_process_first()
        return context

    def node_main_first(self) -> AbstractContextManager[None]:
        """A context whose body one process of each machine runs first, the machine's others after it."""
        context: AbstractContextManager[None] = self.accelerator.local_main_process_first()
        return context

    def close(self) -> None:
        """Leave the process group. No collective operation is possible afterwards."""
        if self.count > 1:
            distributed.destroy_process_group()


class Agreement:
    """The pending answer of `Ranks.any_rank_async`."""

    def __init__(self, vote: Tensor | bool, work: Any) -> None:
        self._vote = vote
        self._work = work

    def result(self) -> bool:
        """True if any rank's flag was. Waits for the other ranks."""
        if self._work is not None:
            self._work.wait()
        return bool(self._vote)


def _explain_write_error(error: OSError) -> LockstepError:
    path, reason = error.filename or "a file", error.strerror or error
    return LockstepError(
        f"cannot write {path}: {reason}; what was complete before is untouched, and run.resume=auto goes on from the "
        f"last checkpoint"
    )
