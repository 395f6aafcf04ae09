"""An optimizer's whole state as named tensors and plain values, and back: a wrapper's inner optimizers included.

torch numbers parameters by their position in the groups, which changes with the config; here each has its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.components.optimizer_parts import (
    inner_optimizers,
    is_as_built,
    own_attributes,
    set_attribute,
)
from trainer.components.parameter_groups import FROM_CONFIG
from trainer.components.state_tree import (
    Decoder,
    Encoder,
    UnsupportedValueError,
    describe_tensor,
)
from trainer.errors import LockstepError, first_few
from trainer.exact.model_and_loss import LOSS_PREFIX, ModelAndLoss
from trainer.exact.shards import is_shard, part_like

# By name an int, float, bool, str or None, or a tree (see `state_tree`); under PARAMETERS a list of names.
Numbers = dict[str, Any]
PARAMETERS = "parameters"  # these cannot clash: every other name has a dot
SHARED = "shared"  # state that belongs to no parameter
ATTRIBUTES = "attributes"
INNER = "inner"
ODD_KEYS = "$odd"  # state of a parameter under keys that are no text, or have a dot
# A group's entries that come from the config.
CONFIG_ENTRIES = {"params", "lr", "initial_lr", "weight_decay", FROM_CONFIG}


def named_state(
    optimizer: Optimizer, model: nn.Module | ModelAndLoss
) -> tuple[dict[str, Tensor], Numbers]:
    """The state as contiguous tensors and plain values, each under `<state key>.<parameter name>`.

    `model` is the module that was passed to `build_optimizer`, unwrapped. What the optimizer changed in its own groups
    goes under `<key>.group <number>`. State of another shape (nested, or of no parameter), attributes of the object
    and the optimizers inside it are trees. Tensors are not copied, but for those of trees. Raises `LockstepError` for
    what cannot be stored.
    """
    return _Reader(optimizer, model).read()


class _Reader:
    def __init__(self, optimizer: Optimizer, model: nn.Module | ModelAndLoss) -> None:
        self._optimizer = optimizer
        self._parameters = dict(model.named_parameters())
        self._names = {id(value): name for name, value in self._parameters.items()}
        self._encoder = Encoder(self._names)
        self._tensors: dict[str, Tensor] = {}
        self._numbers: Numbers = {PARAMETERS: trained_names(optimizer, model)}

    def read(self) -> tuple[dict[str, Tensor], Numbers]:
        optimizer = self._optimizer
        shared: dict[Any, Any] = {}
        for owner, entries in optimizer.state.items():
            if isinstance(owner, Tensor):
                self._read_entries(self._name_of(owner), entries)
            else:
                shared[owner] = entries
        for number, group in enumerate(optimizer.param_groups):
            for key, value in _changed_entries(optimizer, group).items():
                self._store(key, f"group {number}", value)
        if shared:
            self._numbers[SHARED] = self._encode(shared, SHARED)
        self._read_objects()
        return self._tensors | self._encoder.tensors, self._numbers

    def _read_objects(self) -> None:
        attributes = self._attributes_of(self._optimizer, ATTRIBUTES)
        if attributes:
            self._numbers[ATTRIBUTES] = attributes
        inner = {}
        for path, part in inner_optimizers(self._optimizer).items():
            inner[path] = self._read_inner(part, f"{INNER}/{path}")
        if inner:
            self._numbers[INNER] = inner

    def _read_inner(self, part: Optimizer, name: str) -> dict[str, Any]:
        """An inner optimizer as trees, without what it shares with the outer one."""
        tree: dict[str, Any] = {"attributes": self._attributes_of(part, name)}
        outer = self._optimizer
        if part.state is not outer.state:
            tree["state"] = self._encode(dict(part.state), f"{name}/state")
        outer_groups = {id(group) for group in outer.param_groups}
        groups = []
        for number, group in enumerate(part.param_groups):
            is_shared = id(group) in outer_groups
            changed = {} if is_shared else _changed_entries(part, group)
            entries = self._encode(changed, f"{name}/group {number}")
            groups.append(entries)
        tree["groups"] = groups
        return tree

    def _attributes_of(self, optimizer: Optimizer, name: str) -> dict[str, Any]:
        """The attributes that can be stored. Others (functions, modules, loggers) are what the constructor made."""
        trees = {}
        for key, value in own_attributes(optimizer).items():
            encoder = Encoder(self._names)
            try:
                tree = encoder.encode(value, f"{name}/{key}")
            except UnsupportedValueError:
                continue
            if encoder.tensors or not is_as_built(optimizer, key, tree):
                trees[key] = tree
                self._encoder.tensors |= encoder.tensors
        return trees

    def _read_entries(self, owner: str, entries: Any) -> None:
        if not isinstance(entries, Mapping):
            raise LockstepError(
                f'the optimizer\'s state of "{owner}" is a {type(entries).__name__}, not a mapping'
            )
        odd = {}
        for key, value in entries.items():
            if _is_plain_key(key):
                self._store(key, owner, value)
            else:
                odd[key] = value
        if odd:
            self._store(ODD_KEYS, owner, odd)

    def _store(self, key: str, owner: str, value: Any) -> None:
        name = f"{key}.{owner}"
        is_strided = isinstance(value, Tensor) and value.layout == torch.strided
        if not is_strided or id(value) in self._names:
            self._numbers[name] = self._encode(value, name)
            return
        self._tensors[name] = value.detach().contiguous()
        if is_shard(value):
            return  # cut along rows, so it is contiguous and its parameter, too
        if owner in self._parameters:
            # Loading gives a tensor the strides of its parameter, or none of its own.
            parameter = self._parameters[owner]
            has_own_strides = value.stride() != _strides_on_loading(value, parameter)
            needs_node = has_own_strides and value.numel() > 1
        else:
            needs_node = value.device.type != "cpu"  # loading leaves it on the CPU
        if needs_node:
            self._numbers[name] = describe_tensor(value, name)

    def _encode(self, value: Any, name: str) -> Any:
        try:
            return self._encoder.encode(value, name)
        except UnsupportedValueError as error:
            raise LockstepError(
                f"the optimizer's state {error}; only tensors, plain values, and lists and mappings of these can be "
                f"saved"
            ) from None

    def _name_of(self, parameter: Tensor) -> str:
        name = self._names.get(id(parameter))
        if name is None:
            raise LockstepError(
                f"the optimizer has state of a tensor {tuple(parameter.shape)} that is no parameter of the model, and "
                f"it cannot be saved"
            )
        return name


def load_named_state(
    optimizer: Optimizer,
    model: nn.Module | ModelAndLoss,
    tensors: dict[str, Tensor],
    numbers: Numbers,
) -> None:
    """Load what `named_state` returned into an optimizer from `build_optimizer`, on whatever device it is.

    In place: groups and states that a wrapper shares with its inner optimizer stay shared. Raises `LockstepError` if
    the parameters are not those that the state was saved for.
    """
    _Writer(optimizer, model, tensors, numbers).write()


class _Writer:
    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module | ModelAndLoss,
        tensors: dict[str, Tensor],
        numbers: Numbers,
    ) -> None:
        self._optimizer = optimizer
        self._parameters = dict(model.named_parameters())
        self._names = trained_names(optimizer, model)
        self._name_by_id = {id(value): name for name, value in self._parameters.items()}
        device = next(iter(self._parameters.values())).device
        self._decoder = Decoder(tensors, self._parameters, device)
        self._tensors = tensors
        self._numbers = dict(numbers)

    def write(self) -> None:
        optimizer, numbers = self._optimizer, self._numbers
        saved_names = set(numbers.pop(PARAMETERS, []))
        _check_parameters(saved_names, set(self._names))
        shared = self._decoder.decode(numbers.pop(SHARED, {}))
        attributes = self._decoder.decode(numbers.pop(ATTRIBUTES, {}))
        inner = self._decoder.decode(numbers.pop(INNER, {}))
        # After the trees above: which tensors are flat entries is known once all trees have taken theirs.
        entries = self._entries_by_owner()
        optimizer.state.clear()
        for number, group in enumerate(optimizer.param_groups):
            group.update(entries.pop(f"group {number}", {}))
            for parameter in group["params"]:
                name = self._name_by_id[id(parameter)]
                own = entries.get(name)
                if own:
                    optimizer.state[parameter] = self._placed(own, name, group)
        optimizer.state.update(shared)
        for name, value in attributes.items():
            set_attribute(optimizer, name, value)
        self._write_inner(inner)

    def _entries_by_owner(self) -> dict[str, dict[str, Any]]:
        """The flat entries, by parameter or group; trees are decoded."""
        owners = {*self._names}
        for number in range(len(self._optimizer.param_groups)):
            owners.add(f"group {number}")
        decoded = {}
        for name, tree in self._numbers.items():
            decoded[name] = self._decoder.decode(tree)
        values: dict[str, Any] = {}
        for name, tensor in self._tensors.items():
            if name not in self._decoder.used:
                values[name] = tensor
        values |= decoded
        entries: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            key, _, owner = name.partition(".")
            if owner not in owners:
                raise LockstepError(
                    f'the saved optimizer state "{name}" belongs to no parameter of this run'
                )
            own = entries.setdefault(owner, {})
            if key == ODD_KEYS:
                own.update(value)
            else:
                own[key] = value
        return entries

    def _placed(
        self, entries: dict[str, Any], name: str, group: dict[str, Any]
    ) -> dict[str, Any]:
        """A parameter's entries, tensors on its device and in its memory format. Counters stay on the CPU."""
        parameter = self._parameters[name]
        placed = {}
        on_device = group.get("capturable") or group.get("fused")
        for key, value in entries.items():
            # An entry that is no tensor of its own stays as it was decoded.
            placed[key] = value
            # A tensor with a node of its own has been placed by it.
            is_flat = f"{key}.{name}" not in self._decoder.used
            if is_flat and isinstance(value, Tensor) and value is not parameter:
                # torch keeps the counter on the host, unless the step itself runs on the device alone.
                stays = key == "step" and not on_device
                device = None if stays else parameter.device
                placed[key] = _copy(value, parameter, device)
        return placed

    def _write_inner(self, inner: dict[str, Any]) -> None:
        parts = inner_optimizers(self._optimizer)
        for path, tree in inner.items():
            if path not in parts:
                raise LockstepError(
                    f"the saved optimizer holds another in {path}, and this one does not"
                )
            part = parts[path]
            if "state" in tree:
                part.state.clear()
                part.state.update(tree["state"])
            for group, changed in zip(part.param_groups, tree["groups"], strict=True):
                group.update(changed)
            for name, value in tree["attributes"].items():
                set_attribute(part, name, value)


def trained_names(optimizer: Optimizer, model: nn.Module | ModelAndLoss) -> list[str]:
    """The names of the optimizer's parameters, in its own order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = []
    for group in optimizer.param_groups:
        trained += [names[id(parameter)] for parameter in group["params"]]
    return trained


def _is_plain_key(key: Any) -> bool:
    """True for what can stand before the dot of an entry's name."""
    if not isinstance(key, str):
        return False
    return key not in ("", ODD_KEYS) and "." not in key


def _changed_entries(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """The entries of a group that come neither from the config nor from the optimizer's defaults."""
    built = {
        **getattr(optimizer, "defaults", {}),
        **group.get(FROM_CONFIG, {}),
    }
    changed = {}
    for key, value in group.items():
        if key in CONFIG_ENTRIES:
            continue
        if not _same(value, built.get(key)):
            changed[key] = value
    return changed


def _same(value: Any, other: Any) -> bool:
    # Comparing tensors would wait for the device, and be no bool if they have several elements.
    if isinstance(value, Tensor) or isinstance(other, Tensor):
        return value is other
    try:
        return bool(value == other)
    except (RuntimeError, ValueError):  # lists of tensors
        return False


def _strides_on_loading(value: Tensor, parameter: nn.Parameter) -> tuple[int, ...]:
    """The strides that `_copy` gives."""
    is_like_it = value.shape == parameter.shape
    model = parameter if is_like_it else value.contiguous()
    return torch.empty_like(model, device="meta").stride()


def _copy(
    value: Tensor, parameter: nn.Parameter, device: torch.device | None
) -> Tensor:
    """A copy of `value` on `device`, with its own dtype, and the parameter's strides if it has its shape.

    It is shared out over the ranks as the parameter is.
    """
    has_its_shape = value.shape == parameter.shape
    if is_shard(parameter) and has_its_shape:
        part = value if is_shard(value) else part_like(parameter, value)
        return part.clone()
    strides_from = parameter if has_its_shape else value
    copy = torch.empty_like(
        strides_from, dtype=value.dtype, device=device or value.device
    )
    return copy.copy_(value)


def _check_parameters(saved: set[str], present: set[str]) -> None:
    if not any(name.startswith(LOSS_PREFIX) for name in saved):
        # As in a checkpoint from before losses were trained.
        present = {name for name in present if not name.startswith(LOSS_PREFIX)}
    for names, verb in ((present - saved, "lacks"), (saved - present, "has")):
        if names:
            raise LockstepError(
                f"the saved optimizer state {verb} {first_few(sorted(names), 3)}, unlike this run; train the "
                f"parameters that were trained then"
            )
