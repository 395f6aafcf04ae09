"""What the processes of a benchmark need, imported once for all of them."""

import accelerate  # noqa: F401
import sklearn.datasets
import sklearn.model_selection  # noqa: F401
import torchvision.transforms.v2  # noqa: F401

import trainer.trainer  # noqa: F401
