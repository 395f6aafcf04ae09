"""Transforms of a sample: what moves an image's pixels moves its mask too, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from trainer.data.conversion import (
    array_as_tensor,
    describe,
    is_numeric_array,
    is_pil,
    target_as_tensor,
)
from trainer.data.fast_crop import CropBatch, crop_batch, fast_form
from trainer.errors import DataError

# Of v2: they change an image's size alone, so what is measured in shares of it stays.
SIZE_ONLY = ("Resize", "RandomResize", "RandomShortestSize")
# Of v2: they take NumPy arrays themselves.
TAKES_ARRAYS = ("ToImage", "ToPILImage", "ToTensor")
# A side, in pixels; smaller tables of whole numbers are not taken for masks.
SMALLEST_MASK = 5
# The columns of points (x, y) and of boxes.
COORDINATES = (2, 4)


class SampleTransform:
    """A transform, applied to an image and to what of its target has a place in the image.

    Tensors of `torchvision.tv_tensors` are passed to every transform. Whole numbers or bools of the image's size are a
    mask, and go through torchvision's transforms as one.
    """

    def __init__(self, transform: Callable[..., Any], key: str = "transforms") -> None:
        self._key = key
        chain = _chain_of(transform)
        # Each with whether it is torchvision's, and whether it takes NumPy arrays.
        self._chain: list[tuple[Callable[..., Any], bool, bool]] = []
        for each in chain:
            is_v2 = _is_v2(each)
            takes_arrays = not is_v2 or _name(each) in TAKES_ARRAYS
            self._chain.append((each, is_v2, takes_arrays))
        # The same for an image alone.
        self._of_image = []
        for each, is_v2, takes_arrays in self._chain:
            self._of_image.append((fast_form(each), is_v2, takes_arrays))
        every: list[Any] = []
        for outer in chain:
            every += _with_inner(outer)
        # torchvision's transforms leave their input alone, unless they are told otherwise.
        self.may_write = any(map(_may_write, every))
        self._geometric = _names(filter(_is_geometric, every))
        # They move pixels, and take no mask.
        self._image_alone = _names(filter(_moves_image_alone, every))
        moving = [name for name in self._geometric if name not in SIZE_ONLY]
        self._moving = moving + self._image_alone

    def __call__(self, image: Any, target: Any) -> tuple[Any, Any]:
        """The image and the target, transformed. Raises `DataError` where the target would have to move and cannot."""
        # The common case first: to look through the leaves takes longer than some transforms.
        is_plain = isinstance(target, int | float | str)
        is_single_image = not isinstance(image, Mapping | list | tuple)
        if is_plain and is_single_image:
            return self._transform_image(image), target
        has_place = _has_tv_tensor(target)
        if self._geometric or self._image_alone:
            image, target = self._with_masks(image, target)
        # Masks have become tensors with a place by now.
        is_pair = _has_tv_tensor(target)
        if not is_pair:
            image = self._transform_image(image)
            return _map_leaves(image, _without_place), target
        image, target = self._transform_pair(image, target, with_own=has_place)
        return image, _map_leaves(target, _without_place)

    def crop_batch(self) -> CropBatch | None:
        """The same for a batch of decoded images with targets that have no place in them; None if there is no such."""
        return crop_batch([transform for transform, _, _ in self._of_image])

    def _transform_image(self, image: Any) -> Any:
        for transform, is_v2, takes_arrays in self._of_image:
            image = transform(self._input_of(image, is_v2, takes_arrays))
        return image

    def _transform_pair(
        self, image: Any, target: Any, *, with_own: bool
    ) -> tuple[Any, Any]:
        """The pair through every transform of torchvision; users' own get the pair only `with_own`."""
        for transform, is_v2, takes_arrays in self._chain:
            image = self._input_of(image, is_v2, takes_arrays)
            if is_v2 or with_own:
                image, target = transform(image, target)
            else:
                image = transform(image)
        return image, target

    def _input_of(self, image: Any, is_v2: bool, takes_arrays: bool) -> Any:
        """The image as a transform takes it. Raises `DataError` for one that torchvision's would return as it is."""
        if takes_arrays or isinstance(image, Tensor):
            return image
        if is_numeric_array(image):
            return array_as_tensor(image)
        self._check_effect(image)
        return image

    def _check_effect(self, image: Any) -> None:
        """Raise `DataError` for an input that torchvision's transforms would return as it is."""
        for leaf in _leaves(image):
            if isinstance(leaf, Tensor) or is_pil(leaf):
                return
        raise DataError(
            f"{self._key} would not change its input, {describe(image)}: torchvision's transforms take tensors, PIL "
            f"images and NumPy arrays; return one of them, or leave the transforms out"
        )

    def _with_masks(self, image: Any, target: Any) -> tuple[Any, Any]:
        """The pair with each mask as a `tv_tensors.Mask`: of the target, and beside the image in a dict or list."""
        size = _size_of(image)

        def place(leaf: Any) -> Any:
            return self._placed(leaf, size)

        if isinstance(image, Mapping | list | tuple):
            first = _first_image(image)
            image = _map_leaves(
                image, lambda leaf: leaf if leaf is first else place(leaf)
            )
        return image, _map_leaves(target, place)

    def _placed(self, leaf: Any, size: tuple[int, int] | None) -> Any:
        """A part of a sample that is a mask as a `tv_tensors.Mask`; others as they are.

        Raises `DataError` for what has a place in the image and would stay where it is.
        """
        tensor = target_as_tensor(leaf)
        if not isinstance(tensor, Tensor) or _is_tv_tensor(tensor) or tensor.dim() < 2:
            return leaf
        if size is not None and tuple(tensor.shape[-2:]) == size:
            return self._as_mask(tensor)
        if self._moving and size is not None and _is_scaled_mask(tensor, size):
            raise DataError(
                f"{self._key}: {', '.join(self._moving)} would move the image and not its target, {describe(tensor)}, "
                f"a mask of another size; give it the size of the image, {size[0]} × {size[1]}"
            )
        is_list = tensor.dim() == 2 and tensor.shape[1] in COORDINATES
        if is_list and self._moving:
            raise DataError(
                f"{self._key}: {', '.join(self._moving)} would move the image and not its target, {describe(tensor)}; "
                f"give boxes as torchvision.tv_tensors.BoundingBoxes and points as KeyPoints, or leave the transform "
                f"out. A target that has no place in the image may be flattened to one dimension"
            )
        return leaf

    def _as_mask(self, tensor: Tensor) -> Tensor:
        from torchvision.tv_tensors import Mask

        if self._image_alone:
            raise DataError(
                f"{self._key}: {', '.join(self._image_alone)} moves the pixels of an image and takes no mask, and the "
                f"target is {describe(tensor)}, of the image's size; use transforms such as RandomAffine and "
                f"ColorJitter by themselves"
            )
        if tensor.is_floating_point() or tensor.is_complex():
            raise DataError(
                f"{self._key}: {', '.join(self._geometric)} would move the image and not its target, "
                f"{describe(tensor)}, of the image's size; give it as torchvision.tv_tensors.Mask, whose values are "
                f"kept, or as Image, whose values are interpolated"
            )
        mask: Tensor = Mask(tensor)
        return mask


def _chain_of(transform: Any) -> list[Callable[..., Any]]:
    from torchvision.transforms import v2

    if type(transform) is v2.Compose:
        return list(transform.transforms)
    return [transform]


def _with_inner(transform: Any) -> Iterator[Any]:
    """A transform and those that it holds (RandomApply, RandomChoice, …)."""
    yield transform
    inner = getattr(transform, "transforms", ())
    for each in inner if isinstance(inner, list | tuple) else ():
        yield from _with_inner(each)


def _is_v2(transform: Any) -> bool:
    from torchvision.transforms import v2

    return isinstance(transform, v2.Transform)


def _may_write(transform: Any) -> bool:
    from torchvision.transforms import v2

    is_known = _module(transform).startswith("torchvision.transforms.v2.")
    if not is_known or isinstance(transform, v2.Lambda):
        return True  # other people's code
    return bool(getattr(transform, "inplace", False))


def _name(transform: Any) -> str:
    return type(transform).__name__


def _names(transforms: Iterable[Any]) -> list[str]:
    """The name of each kind once, in order."""
    return list(dict.fromkeys(map(_name, transforms)))


def _module(transform: Any) -> str:
    return type(transform).__module__


def _is_geometric(transform: Any) -> bool:
    return _module(transform) == "torchvision.transforms.v2._geometry"


def _moves_image_alone(transform: Any) -> bool:
    """True for those that take no mask: the automatic ones, and those of torchvision's older module."""
    from torchvision.transforms import v2

    if _module(transform) == "torchvision.transforms.v2._auto_augment":
        return True
    if _module(transform) != "torchvision.transforms.transforms":
        return False
    # What the older module has under a name, v2 has under the same.
    twin = getattr(v2, _name(transform), None)
    module_of_twin: str = getattr(twin, "__module__", "")
    return module_of_twin.endswith("_geometry")


def _has_tv_tensor(value: Any) -> bool:
    return any(map(_is_tv_tensor, _leaves(value)))


def _is_tv_tensor(value: Any) -> bool:
    # A plain tensor is none, and then torchvision need not be imported.
    if type(value) is Tensor or not isinstance(value, Tensor):
        return False
    from torchvision.tv_tensors import TVTensor

    return isinstance(value, TVTensor)


def _without_place(leaf: Any) -> Any:
    return leaf.as_subclass(Tensor) if _is_tv_tensor(leaf) else leaf


def _is_scaled_mask(tensor: Tensor, size: tuple[int, int]) -> bool:
    """True for whole numbers in the proportions of an image."""
    if tensor.is_floating_point() or tensor.is_complex():
        return False
    height, width = tensor.shape[-2:]
    image_height, image_width = size
    is_large = min(height, width) >= SMALLEST_MASK
    # The two ratios of sides, without a division that would round.
    return is_large and height * image_width == width * image_height


def _size_of(image: Any) -> tuple[int, int] | None:
    """Height and width of an image, or of the first one in a dict, list or tuple; None if there is none."""
    leaf = _first_image(image)
    if is_pil(leaf):
        return leaf.height, leaf.width
    if is_numeric_array(leaf):
        leaf = array_as_tensor(leaf)
    if not isinstance(leaf, Tensor):
        return None
    height, width = leaf.shape[-2:]
    return height, width


def _first_image(value: Any) -> Any:
    for leaf in _leaves(value):
        if _is_image(leaf):
            return leaf
    return None


def _is_image(value: Any) -> bool:
    if is_pil(value):
        return True
    is_array = isinstance(value, Tensor) or is_numeric_array(value)
    return is_array and value.ndim >= 2


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same nested dicts, lists and tuples with every leaf changed."""
    if isinstance(value, Mapping):
        return {key: _map_leaves(inner, change) for key, inner in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map_leaves(inner, change) for inner in value))
    if isinstance(value, list | tuple):
        return type(value)(_map_leaves(inner, change) for inner in value)
    return change(value)
