"""This process among the run's processes (ranks), and their collective operations. Accelerate starts and joins them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property, partial
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    patch_environment,
)
from torch import Tensor, distributed, nn

from trainer.errors import ConfigError, LockstepError, OtherRankFailed, first_few
from trainer.process import launcher
from trainer.process.device import check_precision, check_process_count, chosen_kind
from trainer.process.exit import delay_exit_for_gloo
from trainer.process.flight_recorder import enable_flight_recorder
from trainer.process.host_group import HostGroup
from trainer.process.interface import choose_gloo_interface
from trainer.process.launcher_settings import check_launcher_settings, check_world_size
from trainer.process.levels import Level, all_ranks, levels_of
from trainer.process.restart import join_after_restart
from trainer.process.uncaught import report_uncaught_errors

DEFAULT_TIMEOUT = 1800.0  # seconds; that of run.timeout
LONGEST_TIMEOUT = (
    1e6  # seconds; the clocks of the process groups take no more than some years
)
DEVICE_MARGIN = 60.0  # seconds
# Of `main_first`, after rank 0's and that of each other machine's first rank.
LAST_TURN = 2
MAX_NAMED_RANKS = 8  # in a message

T = TypeVar("T")


class Ranks:
    """This process among the run's processes.

    Attributes: `rank` of `count`; `is_main`, true on rank 0; `device`; `accelerator`, Accelerate's own object.
    """

    def __init__(self, precision: str, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Join the processes. `precision` is the config's, which the launcher must not contradict.

        A rank waits for the others at most `timeout` seconds.
        """
        if timeout > LONGEST_TIMEOUT:
            raise ConfigError(
                "run.timeout",
                f"{timeout:g} seconds are more than a wait may last; set at most {LONGEST_TIMEOUT:,.0f}",
            )
        check_launcher_settings(precision)
        check_process_count(chosen_kind(), launcher.world_size())
        choose_gloo_interface()
        enable_flight_recorder()
        is_on_device = torch.accelerator.is_available()
        # On GPUs the host gives up first, because its message names the ranks that did not come.
        seconds = timeout + (DEVICE_MARGIN if is_on_device else 0)
        self._device_timeout = timedelta(seconds=seconds)
        join_after_restart(self._device_timeout)
        self.accelerator = Accelerator(
            # `Precision` does it, with one code path for every device.
            mixed_precision="no",
            # Without True, torchrun's processes do not join.
            cpu=None if is_on_device else True,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=self._device_timeout)],
        )
        self.rank: int = self.accelerator.process_index
        self.count: int = self.accelerator.num_processes
        self.is_main: bool = self.accelerator.is_main_process
        self.device: torch.device = self.accelerator.device
        check_precision(self.device.type, precision)
        check_world_size(self.count)
        if self.count > 1:
            delay_exit_for_gloo()
            report_uncaught_errors()  # above the hook that torch has set by now
        self._host = HostGroup(self.rank, self.count, timeout)

    @property
    def machines(self) -> list[str]:
        """The host names of the ranks' machines, in rank order."""
        return self._host.machines

    @cached_property
    def levels(self) -> list[Level]:
        """In which groups the ranks combine tensors: by machine first, where that saves traffic between machines.

        The first use is a collective.
        """
        return levels_of(self.machines, self.rank, self._device_timeout)

    # ---------------------------------------------------------------- models

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model on its device, wrapped in DDP if there are several processes; releases one prepared before."""
        self.accelerator.free_memory()
        self.accelerator.ddp_handler = DistributedDataParallelKwargs(
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
        # Newer torch renames the option, older torch has the old name only.
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="`broadcast_buffers` is deprecated"
            )
            # DDP keeps to the device that the model is on. Accelerate would name LOCAL_RANK's, which does not exist
            # where a launcher shows each process one GPU (`srun --gpus-per-task=1`).
            with patch_environment(accelerate_bypass_device_map="true"):
                prepared: nn.Module = self.accelerator.prepare_model(
                    model, device_placement=not self._has(model)
                )
        return prepared

    def _has(self, model: nn.Module) -> bool:
        """True if all of it is on the run's device: to move it there again would part buffers that modules share."""
        # "cpu" and "cpu:0" are two devices to torch.
        kind = self.device.type
        return all(
            tensor.device == self.device or tensor.device.type == kind == "cpu"
            for tensor in chain(model.parameters(), model.buffers())
        )

    def broadcast_parameters(self, model: nn.Module) -> nn.Module:
        """The model with rank 0's parameters and buffers on every rank."""
        if self.count > 1:
            for tensor in model.state_dict().values():
                if isinstance(tensor, Tensor):  # else a module's extra state
                    self.broadcast_tensor(tensor)
        return model

    @torch.no_grad()
    def broadcast_tensor(self, tensor: Tensor) -> None:
        """Give a tensor on the run's device rank 0's elements, in place. Its shape and dtype are the same everywhere.

        Bytes are sent, since gloo does not know every dtype; elements in row-major order, since strides may differ.
        """
        # The tensor's own memory unless it has other strides.
        elements = tensor.detach().contiguous().reshape(-1)
        if not elements.numel():
            return
        distributed.broadcast(elements.view(torch.uint8), src=0)
        if elements.data_ptr() != tensor.data_ptr():
            tensor.copy_(elements.view(tensor.shape))

    @torch.no_grad()
    def broadcast_together(self, tensors: list[Tensor], source: int) -> None:
        """Give tensors on the run's device the elements of rank `source`, in place, by one operation for all."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([_as_bytes(tensor) for tensor in tensors])
        distributed.broadcast(flat, src=source)
        if self.rank == source:
            return
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        for tensor, part in zip(tensors, torch.split(flat, sizes), strict=True):
            # A copy begins at an address that its dtype can have.
            elements = part.clone().view(tensor.dtype)
            tensor.copy_(elements.view(tensor.shape))

    def broadcast_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rank 0's `tensors`, by name, on every rank, on the CPU. The device holds one of them at a time."""
        if self.count == 1:
            return dict(tensors)
        results: dict[str, Tensor] = {}
        for name, buffer in self.broadcast_each(tensors):
            results[name] = tensors[name] if self.is_main else buffer.cpu()
        return results

    def broadcast_each(
        self, tensors: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Rank 0's `tensors` on every rank's device, one after the other, with their names."""
        layout = self.on_main(
            lambda: [
                (name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()
            ]
        )
        for name, shape, dtype in layout:
            if self.is_main:
                buffer = tensors[name].to(self.device)
            else:
                buffer = torch.empty(shape, dtype=dtype, device=self.device)
            self.broadcast_tensor(buffer)
            yield name, buffer

    # ---------------------------------------------------------------- tensors

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place."""
        if self.count > 1:
            distributed.all_reduce(tensor)
        return tensor

    def all_gather_by_sends(
        self, shard: Tensor, whole: Tensor, level: Level | None = None
    ) -> None:
        """Fill `whole`, `(members, n)`, with the `shard`, `(n,)`, of every member of the level, or of every rank."""
        self.all_gather_by_sends_async(shard, whole, level)()

    def all_gather_by_sends_async(
        self, shard: Tensor, whole: Tensor, level: Level | None = None
    ) -> Callable[[], None]:
        """Start to do the same. The function returned waits until `whole` is filled.

        On the CPU all sends and receives are started at once: on gloo that takes a third of the time of its
        `all_gather`. A GPU's tensors may be on a group that has no point-to-point transfers for them.
        """
        if level is None:
            level = all_ranks(self.count)
        members, group = level.members, level.group
        if self.device.type != "cpu":
            gathered = distributed.all_gather_into_tensor(
                whole.view(-1), shard, group=group, async_op=True
            )
            return partial(_wait_for, [gathered])
        own = members.index(self.rank)
        if whole[own].data_ptr() != shard.data_ptr():
            whole[own].copy_(shard)
        exchanges = []
        for distance in range(1, len(members)):
            to = (own + distance) % len(members)
            source = (own - distance) % len(members)
            exchanges += [
                distributed.P2POp(distributed.isend, shard, members[to], group),
                distributed.P2POp(
                    distributed.irecv, whole[source], members[source], group
                ),
            ]
        works = distributed.batch_isend_irecv(exchanges)
        return partial(_wait_for, works)

    # ---------------------------------------------------------------- Python objects and decisions

    def gather(self, items: list[Any]) -> list[Any]:
        """The concatenation of every rank's `items`, in rank order, on every rank."""
        if self.count == 1:
            return items
        return list(chain.from_iterable(self._host.gather(items)))

    def gather_on_main(self, item: Any) -> list[Any]:
        """Every rank's `item`, in rank order, on the main process alone; an empty list on the others."""
        return self._host.to_main(item)

    def barrier(self) -> None:
        """Wait on the host until every rank is here: before the device's group starts to count the seconds."""
        self._host.any_each([False])

    def any_rank_each(self, flags: list[bool]) -> list[bool]:
        """For each flag, whether it is true on any rank: waits for the other hosts, never for a GPU."""
        return self._host.any_each(flags)

    def largest_each_async(self, values: list[int]) -> Callable[[], list[int]]:
        """Start asking for the largest of all ranks' values, 0 to 255, in each place; the function returned waits."""
        return self._host.largest_each_async(values)

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Run `action` on the main process. Every rank returns its result, or raises the same error if it fails.

        The others wait on the host for as long as it takes.
        """
        crashes: list[Exception] = []
        result, failure = self._host.from_main(partial(_run_on_main, action, crashes))
        if crashes:
            raise crashes[0]
        if failure is not None:
            raise failure
        return result

    def on_each(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; each returns its own result. If it fails on any, all raise the same error.

        Otherwise the others would wait for the failed rank. Where only some ranks fail, the error names them.
        """
        result: T | None = None
        failure: LockstepError | None = None
        crash: Exception | None = None
        try:
            result = action()
        except LockstepError as error:
            failure = error
        except Exception as error:
            failure = OtherRankFailed(f"{type(error).__name__}: {error}")
            crash = error
        failures = self._host.gather(failure)
        if crash is not None:
            raise crash  # a defect of the program: this rank shows the traceback
        failed = [rank for rank, other in enumerate(failures) if other is not None]
        if failed:
            first: LockstepError = failures[failed[0]]
            raise (
                first if len(failed) == self.count else self._with_ranks(first, failed)
            )
        return cast(T, result)

    def _with_ranks(self, error: LockstepError, failed: list[int]) -> LockstepError:
        """An error that names the ranks it happened on, and the first one's machine."""
        names = first_few(failed, MAX_NAMED_RANKS)
        machine = self.machines[failed[0]]
        ranks = f"(on rank {names} of {self.count}, machine {machine}; the other ranks do not fail)"
        if isinstance(error, ConfigError):
            return ConfigError(error.key, f"{error.message} {ranks}")
        return type(error)(f"{error} {ranks}")

    def explain(self, error: RuntimeError) -> LockstepError | None:
        """The error in terms of ranks, if a collective operation timed out, here or on another rank; else None."""
        return self._host.explain(error)

    # ---------------------------------------------------------------- order, and the end

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """A context whose body rank 0 runs first, then one rank of each other machine, then all others.

        What rank 0 downloads is there for the others where machines share a disk. Where they do not, each machine
        downloads once. Where the body fails, no rank of a later turn runs it.
        """
        own_turn = self._turn()
        for turn in range(LAST_TURN):
            if turn == own_turn:
                with self._host.first(True):
                    yield
            else:
                with self._host.first(False):
                    pass
        if own_turn == LAST_TURN:
            yield

    def _turn(self) -> int:
        if self.is_main:
            return 0
        own_machine = self.machines[self.rank]
        is_first_of_machine = self.machines.index(own_machine) == self.rank
        return 1 if is_first_of_machine else LAST_TURN

    def close(self) -> None:
        """Leave the process group. No collective operation is possible afterwards."""
        if self.count > 1:
            distributed.destroy_process_group()


def _wait_for(works: list[Any]) -> None:
    for work in works:
        work.wait()


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _run_on_main(
    action: Callable[[], Any], crashes: list[Exception]
) -> tuple[Any, LockstepError | None]:
    """The result of `action`, and what all ranks are to raise. A defect of the program goes to `crashes`."""
    try:
        return action(), None
    except OSError as error:
        return None, _explain_write_error(error)
    except LockstepError as error:
        return None, error
    except Exception as error:
        # This rank shows the traceback, and the others must not wait for a result.
        crashes.append(error)
        return None, OtherRankFailed(f"the main process failed: {error}")


def _explain_write_error(error: OSError) -> LockstepError:
    path, reason = error.filename or "a file", error.strerror or error
    return LockstepError(
        f"cannot write {path}: {reason}; what was complete before is untouched, and run.resume=auto goes on from the "
        f"last checkpoint"
    )
